"""Every place where vLLM's own code is changed or asked for what its versions name differently."""
