"""The ring's own thread: turns a node until the ring is over, and watches what the process depends on.

The thread owns every socket. The model's thread only ever touches queues, so a forward pass delays no heartbeat and a
blocked send delays no forward pass.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence

from stagewire.config import Address, StageConfig
from stagewire.errors import InternalError, PeerError, StageLost, StagewireError
from stagewire.ring.actions import Data
from stagewire.ring.link import Transport
from stagewire.ring.node import Delivery, Item, Observer, RingNode
from stagewire.ring.state import RingState
from stagewire.wire.codec import Frame
from stagewire.wire.messages import StageIdentity, StageReport

__all__ = ["RingRuntime", "new_incarnation"]

TURN_S = 0.2
# From the end of a ring until what was said last has left and its sockets are closed.
END_S = 5.0


def new_incarnation() -> str:
    """Tells this process from an earlier one with the same index."""
    return secrets.token_hex(8)


class RingRuntime(Observer):
    """A ring node with a thread.

    Args:
        config: this stage's place.
        identity: what it tells the others.
        transport: how frames travel; handed over to the thread.
        observer: told about the ring's life, from the thread.
        watch: called a few times a second; what it returns (a reason) ends the ring, for instance a parent's death.
        max_unread_bytes: see `RingNode`.
    """

    def __init__(
        self,
        config: StageConfig,
        identity: StageIdentity,
        transport: Transport,
        observer: Observer,
        watch: Callable[[], str | None] = lambda: None,
        max_unread_bytes: float = math.inf,
    ) -> None:
        first_epoch = secrets.randbelow(1 << 30) + 1
        state = RingState(config, identity, time.monotonic_ns() / 1e9, first_epoch)
        self.node = RingNode(config, state, transport, time.monotonic_ns, self, max_unread_bytes)
        self.identities: tuple[StageIdentity, ...] = ()
        self.error: StagewireError | None = None
        self._observer = observer
        self._watch = watch
        self._settled = threading.Event()  # open, failed or stopped
        self._thread = threading.Thread(target=self._run, name="stagewire-ring", daemon=True)

    def __repr__(self) -> str:
        return f"RingRuntime({self.node!r})"

    # ---- from the model's thread -----------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def wait_open(self, timeout_s: float) -> None:
        """Blocks until the ring has been whole once.

        Raises:
            StagewireError: why it never will be.
        """
        if not self._settled.wait(timeout_s):
            raise PeerError(f"waited {timeout_s:.0f} s for {self.node.state.waits_for()}")
        if self.error is not None:
            self._join()
            raise self.error

    def send(self, message: Data, payloads: Sequence[Frame] = ()) -> None:
        self.node.send(message, payloads)

    def receive(self, timeout_s: float | None) -> Item | None:
        """The next message or news for the model's thread; None once the ring was stopped in order.

        Raises:
            StagewireError: the ring has failed.
            queue.Empty: nothing came within ``timeout_s``.
        """
        item = self.node.take(timeout_s)
        if item is None or isinstance(item, StagewireError):
            self._join()
            self.node.inbox.put(item)  # for whoever asks next
            if item is not None:
                raise item
            return None
        return item

    def stop(self, text: str) -> None:
        """Ends the ring in order: tells the others, flushes, closes. Returns when the thread has ended."""
        self.node.request_stop(text)
        self._join()

    def fail(self, error: StagewireError) -> None:
        """Ends the ring because this stage cannot go on; the others learn why."""
        self.node.request_fail(error)
        self._join()

    def end_epoch(self, epoch: int, error: StageLost) -> None:
        """Gives up what is in flight in ``epoch``, because a step failed; the ring comes back by itself."""
        self.node.request_end_of_epoch(epoch, error)

    def _join(self) -> None:
        """Until the thread has ended, or the process with it: the last word of a stage is not to be a traceback."""
        if self._thread.ident is not None:  # a ring that was never started has ended
            self._thread.join(END_S)

    @property
    def hop_ns(self) -> int:
        """One-way time to the predecessor: half of the last ping; 0 while unknown."""
        return self.node.state.hop_ns

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self.node.turn(TURN_S):
                reason = self._watch()
                if reason:
                    self.node.request_stop(reason)
        except Exception as error:  # noqa: BLE001  the top of this thread: report, never vanish
            self.on_failed(InternalError(f"the ring's thread ended: {type(error).__name__}: {error}"))
            self.node.inbox.put(self.error)
        finally:
            self.node.transport.close()
            self._settled.set()
            self._observer.on_ended()

    def on_log(self, text: str, is_warning: bool) -> None:
        self._observer.on_log(text, is_warning)

    def on_bound(self, address: Address) -> None:
        self._observer.on_bound(address)

    def on_open(self, epoch: int, identities: tuple[StageIdentity, ...]) -> None:
        self.identities = identities
        self._settled.set()
        self._observer.on_open(epoch, identities)

    def on_broken(self, epoch: int, error: StageLost) -> None:
        self._observer.on_broken(epoch, error)

    def takes(self, delivery: Delivery) -> bool:
        return self._observer.takes(delivery)

    def report(self) -> StageReport | None:
        return self._observer.report()

    def on_reports(self, reports: Sequence[StageReport]) -> None:
        self._observer.on_reports(reports)

    def on_failed(self, error: StagewireError) -> None:
        self.error = error
        self._settled.set()
        self._observer.on_failed(error)

    def on_stopped(self, text: str) -> None:
        self.error = self.error or PeerError(f"the ring was stopped: {text}")
        self._settled.set()
        self._observer.on_stopped(text)
