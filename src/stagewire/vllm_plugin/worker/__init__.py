"""One rank's layers: vLLM's worker, what goes in and out of a step, and how requests are restored."""
