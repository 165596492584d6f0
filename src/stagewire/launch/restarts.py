"""What follows when a stage of a serving pipeline ends: a new process, its standby, or the end of all. Pure.

A failure counts when it comes before the stage has been ready for long; then it is one more in a row.
"""

from __future__ import annotations

from enum import Enum

from stagewire.launch.spec import Timeouts

__all__ = ["DEFAULT_MAX_RESTARTS", "Follows", "count_failures", "pause_s", "what_follows"]

DEFAULT_MAX_RESTARTS = 6


class Follows(Enum):
    """What a launcher does after a stage's process, or its standby's, has ended."""

    START_AGAIN = "a new process is started"
    TAKE_OVER = "the standby takes the stage's place"
    GO_ON_WITHOUT = "it was a standby, and no other is started"
    STOP_ALL = "every stage is stopped"


def what_follows(num_failures: int, max_restarts: int, *, is_standby: bool, has_standby: bool) -> Follows:
    """By what has ended, and how often in a row.

    ==========================  ====================  ==================
    failures in a row           a stage               a standby
    ==========================  ====================  ==================
    ``max_restarts`` or fewer   START_AGAIN, or       START_AGAIN
                                TAKE_OVER
    more                        STOP_ALL              GO_ON_WITHOUT
    ==========================  ====================  ==================

    A standby that was asked for is there to be used: its stage may fail once even if ``max_restarts`` is 0.

    Args:
        num_failures: in a row, this one included.
        is_standby: whether the process that ended was a standby.
        has_standby: whether another process of this stage stands by now.
    """
    num_allowed = max(max_restarts, 1) if has_standby else max_restarts
    if num_failures > num_allowed:
        return Follows.GO_ON_WITHOUT if is_standby else Follows.STOP_ALL
    return Follows.TAKE_OVER if has_standby else Follows.START_AGAIN


def count_failures(num_before: int, ready_s: float | None, timeouts: Timeouts) -> int:
    """How many failures in a row this one makes. ``ready_s``: how long the process was ready; None: it never was."""
    if ready_s is not None and ready_s >= timeouts.healthy:
        return 1
    return num_before + 1


def pause_s(num_failures: int, timeouts: Timeouts) -> float:
    """How long to wait before the next start: not at all after one failure, then twice as long each time."""
    if num_failures < 2:
        return 0.0
    pause: float = timeouts.back_off * 2 ** (num_failures - 2)
    return min(pause, timeouts.most_back_off)
