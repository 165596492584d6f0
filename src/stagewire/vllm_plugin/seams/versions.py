"""Which vLLM versions this Stagewire supports, and which one is installed."""

from __future__ import annotations

from stagewire.errors import ConfigError

__all__ = ["SUPPORTED", "check_version", "expected", "is_at_least"]

SUPPORTED = ((0, 30), (0, 33))  # from, below


def is_at_least(major: int, minor: int) -> bool:
    """Whether the installed vLLM is this version or a later one."""
    from vllm.version import __version_tuple__

    return tuple(__version_tuple__[:2]) >= (major, minor)


def check_version() -> None:
    """Raises ConfigError for an unsupported vLLM, naming the installed and the supported versions."""
    from vllm.version import __version__

    if not is_at_least(*SUPPORTED[0]) or is_at_least(*SUPPORTED[1]):
        low, high = (".".join(str(part) for part in bound) for bound in SUPPORTED)
        raise ConfigError(
            f"vLLM {__version__} is installed, this Stagewire supports vllm>={low},<{high}: install a supported vLLM, "
            "or a Stagewire release for this one"
        )


def expected() -> str:
    return f"Stagewire supports vllm>={SUPPORTED[0][0]}.{SUPPORTED[0][1]},<{SUPPORTED[1][0]}.{SUPPORTED[1][1]}"
