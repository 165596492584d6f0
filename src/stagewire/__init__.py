"""Stagewire: one model over many independent `vllm serve` processes, joined in a ring over ZeroMQ."""

from stagewire.llm import head
from stagewire.version import __version__

__all__ = ["__version__", "head"]
