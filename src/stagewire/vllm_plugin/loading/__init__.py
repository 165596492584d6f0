"""Loads the layers of one stage from a checkpoint's files, and prepares vLLM's models to be cut into stages."""
