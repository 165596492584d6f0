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
    """Base of the tree. ``exit_code`` is what a process that dies of it returns."""

    exit_code = 1


class ConfigError(StagewireError, ValueError):
    """A setting is missing, malformed, or does not fit the model or the other stages."""

    exit_code = 2


class PeerError(StagewireError):
    """Another stage did not answer, disappeared, or answered nonsense."""

    exit_code = 3


class StageLost(PeerError):
    """A stage of the running pipeline is gone. ``stage`` is its index; ``step``: what failed there, -1 for no step."""

    def __init__(self, stage: int, message: str, step: int = -1) -> None:
        super().__init__(message)
        self.stage = stage
        self.step = step


class ProtocolError(PeerError):
    """Bytes from a peer that do not decode to a message we allow."""


class WireVersionError(ProtocolError):
    """A Stagewire message of another wire version: a stage, but not one to talk with."""


class RankError(StagewireError):
    """A tensor parallel rank of this stage cannot go on, and so the stage cannot.

    ``exit_code``: of the error that the rank itself had; 1 when it died or hangs.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class InternalError(StagewireError):
    """A state that this code believes impossible."""
