"""What vLLM's command line and Python see: the flags, the start-up of a stage, external mode's settings."""
