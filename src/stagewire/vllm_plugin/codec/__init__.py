"""vLLM's schedules, results and calls as bytes, and the closed list of calls."""
