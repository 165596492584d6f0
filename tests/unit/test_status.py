"""What a stage tells its launcher: nothing that matters is lost on a listener that is held up."""

from __future__ import annotations

import threading
from pathlib import Path

from stagewire.observe.status_events import Phase, StatusReceiver, StatusSender


def test_events_wait_for_a_listener_whose_queue_is_full(tmp_path: Path) -> None:
    receiver = StatusReceiver(str(tmp_path / "socket"))
    sender = StatusSender(3, [receiver.path])
    for percent in range(1, 100):
        sender.advance(Phase.LOADING, "layers", percent, 100)  # returns at once
    thread = threading.Thread(target=sender.send, args=(Phase.READY,))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive(), "it waits for room"
    found = receiver.receive()
    thread.join(10)
    assert not thread.is_alive()
    found += receiver.receive()
    phases = [event.phase for event in found]
    assert 0 < phases.count(Phase.LOADING) < 99, "a short queue, and what did not fit is gone"
    assert phases.count(Phase.READY) == 1
    assert found[-1].stage == 3


def test_a_listener_that_went_away_costs_nothing(tmp_path: Path) -> None:
    receiver = StatusReceiver(str(tmp_path / "socket"))
    sender = StatusSender(0, [receiver.path, str(tmp_path / "never")])
    receiver.close()
    sender.send(Phase.READY)
    sender.note("nobody hears this")
    sender.close()
