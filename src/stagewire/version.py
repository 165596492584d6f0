"""The version of this package, as the pyproject says it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
