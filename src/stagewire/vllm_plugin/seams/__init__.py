"""Every place where vLLM's own code is patched, or called in a way that differs between its versions."""
