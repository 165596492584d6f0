"""What a launcher does after a stage has ended: the pauses before it starts one again."""

from __future__ import annotations

from stagewire.launch.restarts import pause_s
from stagewire.launch.spec import Timeouts


def test_each_is_twice_as_long_as_the_one_before_up_to_a_limit() -> None:
    timeouts = Timeouts(back_off=1.0, most_back_off=30.0)
    assert [pause_s(num_failures, timeouts) for num_failures in range(1, 9)] == [0, 1, 2, 4, 8, 16, 30, 30]
