"""What a launcher decides when a stage speaks or ends, without a process: who is to blame, and what follows."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from stagewire.launch.local_stage import LocalStage, is_cause_known, root_cause
from stagewire.launch.pace import Pace
from stagewire.launch.restarts import Follows, count_failures, what_follows
from stagewire.launch.spec import StageSpec, Timeouts
from stagewire.observe.status_events import Phase, StatusEvent
from stagewire.plan.ranges import LayerRange


def stage(returncode: int | None = None) -> LocalStage:
    process = Mock(returncode=returncode, pid=7)
    return LocalStage(StageSpec(1, 2, LayerRange(0, 1), 1, 2), process, Path("no.log"), Pace(0.0))


@pytest.mark.parametrize(
    ("num_failures", "max_restarts", "is_standby", "has_standby", "follows"),
    [
        (1, 2, False, False, Follows.START_AGAIN),
        (2, 2, False, True, Follows.TAKE_OVER),
        (2, 2, True, False, Follows.START_AGAIN),
        (3, 2, False, True, Follows.STOP_ALL),
        (3, 2, True, False, Follows.GO_ON_WITHOUT),
        (1, 0, False, False, Follows.STOP_ALL),
        (1, 0, False, True, Follows.TAKE_OVER),
        (2, 0, False, True, Follows.STOP_ALL),
        (1, 0, True, False, Follows.GO_ON_WITHOUT),
    ],
)
def test_what_follows(
    num_failures: int, max_restarts: int, is_standby: bool, has_standby: bool, follows: Follows
) -> None:
    assert what_follows(num_failures, max_restarts, is_standby=is_standby, has_standby=has_standby) is follows


@pytest.mark.parametrize(("ready_s", "count"), [(None, 4), (0.0, 4), (59.9, 4), (60.0, 1)])
def test_a_stage_that_was_ready_for_long_is_counted_from_one(ready_s: float | None, count: int) -> None:
    assert count_failures(3, ready_s, Timeouts(healthy=60.0)) == count


def test_a_link_that_comes_while_a_stage_loads_is_shown_after_it() -> None:
    own = stage()
    shown = [
        [event.phase for event in own.take(StatusEvent(1, phase), now=1.0)]
        for phase in (Phase.LOADING, Phase.LINKED, Phase.LOADED, Phase.LINKED, Phase.READY, Phase.KV_CACHE)
    ]
    assert shown == [[Phase.LOADING], [], [Phase.LOADED, Phase.LINKED], [], [Phase.READY], []]
    assert own.phase is Phase.READY


def test_the_first_word_of_an_end_counts() -> None:
    own = stage()
    for text in ("first", "second"):
        assert own.take(StatusEvent(1, Phase.FAILED, text, exit_code=2), now=1.0) == []
    assert (own.progress().failure, own.exit_code) == ("first", 2)


@pytest.mark.parametrize(
    ("codes", "cause", "is_known"),
    [
        ([3, None, -9], -9, True),
        ([3, None, 2], 2, True),
        ([3, None, 1], 1, False),
        ([3, 0, None], 0, False),
        ([3, 3, 1], 1, True),
    ],
)
def test_the_likeliest_root_cause(codes: list[int | None], cause: int, is_known: bool) -> None:
    stages = [stage(code) for code in codes]
    assert root_cause(stages).exit_code == cause
    assert is_cause_known(stages) is is_known


@pytest.mark.parametrize(("returncode", "code"), [(-9, 1), (0, 1), (3, 3)])
def test_a_stage_that_ends_never_makes_the_launcher_end_with_0(returncode: int, code: int) -> None:
    assert stage(returncode).failed("why").exit_code == code
