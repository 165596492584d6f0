"""Encodes vLLM's schedules, results and calls to bytes and back, and holds the closed list of calls."""
