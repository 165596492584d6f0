"""Every error that Stagewire raises on purpose.

    StagewireError
    ├── ConfigError      your configuration: something that was typed or given is wrong   exit code 2
    ├── PeerError        another stage, or the network to it                              exit code 3
    │   ├── StageLost    a stage that was part of the running pipeline is gone
    │   └── ProtocolError  a peer sent bytes that are not a valid message
    │       └── WireVersionError  they are a message of another wire version
    ├── RankError        a tensor parallel rank of this stage failed, died or hangs       the rank's own, or 1
    └── InternalError    a bug of ours; also what any other exception counts as           exit code 1

A message says what was expected, what was found, where, and what to try next.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "InternalError",
    "PeerError",
    "ProtocolError",
    "RankError",
    "StageLost",
    "StagewireError",
    "WireVersionError",
]


class StagewireError(Exception):
    """Base of the tree. ``exit_code`` is the exit code of a process that ends with the error."""

    exit_code = 1


class ConfigError(StagewireError, ValueError):
    """A setting is missing, malformed, or does not fit the model or the other stages."""

    exit_code = 2


class PeerError(StagewireError):
    """Another stage did not answer, disappeared, or answered nonsense."""

    exit_code = 3


class StageLost(PeerError):
    """A stage of the running pipeline is gone.

    ``stage`` is its index. ``step`` is the step that failed there, -1 for none.
    """

    def __init__(self, stage: int, message: str, step: int = -1) -> None:
        super().__init__(message)
        self.stage = stage
        self.step = step


class ProtocolError(PeerError):
    """Bytes from a peer that do not decode to an allowed message."""


class WireVersionError(ProtocolError):
    """A Stagewire message of another wire version. The peer is a stage, but this one cannot talk to it."""


class RankError(StagewireError):
    """A tensor parallel rank of this stage cannot go on, so the stage cannot either.

    ``exit_code``: that of the rank's own error; 1 when the rank died or hangs.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class InternalError(StagewireError):
    """A state that should be impossible: a bug in this code."""
