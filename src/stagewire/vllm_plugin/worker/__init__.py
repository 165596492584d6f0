"""One rank of a stage: vLLM's worker, the input and output of a step, and how requests are restored."""
