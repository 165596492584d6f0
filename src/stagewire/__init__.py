"""Stagewire: one model over many independent `vllm serve` processes, joined in a ring over ZeroMQ."""

__version__ = "0.1.0"

from stagewire.llm import head

__all__ = ["__version__", "head"]
