"""How a stage is started from vLLM's command line or Python: flags, start-up, and the settings of external mode."""
