"""Every text-generation architecture of vLLM that declares pipeline support, over three stages and in one process.

run.py is the command; docs/reference/models.md is what it writes.
"""
