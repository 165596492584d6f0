"""The pauses of a launcher before it starts a stage again."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

from stagewire.launch.supervisor import Supervisor, Timeouts


def test_each_is_twice_as_long_as_the_one_before_up_to_a_limit() -> None:
    """Nobody is started: only the lengths are looked at."""

    async def pauses() -> list[float]:
        timeouts = Timeouts(back_off=1.0, most_back_off=30.0)
        supervisor = Supervisor([], Mock(), [], Mock(), Mock(), "", Mock(), Mock(), timeouts)
        found = [supervisor._start_later(Mock(), num_failures) for num_failures in range(1, 9)]
        for task in supervisor._restarts:
            task.cancel()
        return found

    assert asyncio.run(pauses()) == [0, 1, 2, 4, 8, 16, 30, 30]
