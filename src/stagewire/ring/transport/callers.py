"""Who calls this stage: what each connection brings, and whether the answers arrive.

Strangers can call as well as the successor, so nothing is known about a caller but its TCP connection. One that sends
more than a stage has to say is hung up on. One that does not acknowledge what is sent to it is ended, too: whoever is
there connects anew. Unix sockets are not counted, because only this user can call there.

Knows connections by the kernel's counters (transport/tcp_counters.py); not what their messages mean.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import zmq
from zmq.utils.monitor import recv_monitor_message

from stagewire.config import KEY_FILE_FLAG
from stagewire.ring.rules import timeouts
from stagewire.ring.rules.actions import Side
from stagewire.ring.transport.interface import BadHandshake, Event, Stalled
from stagewire.ring.transport.link import BAD_HANDSHAKES
from stagewire.ring.transport.sockets import Context, Socket
from stagewire.ring.transport.tcp_counters import Intake, Outflow, Ports
from stagewire.wire.codec import MAX_HEADER_BYTES

__all__ = ["MAX_BACKWARD_BYTES", "Callers"]

# Successors send greetings, pings and refusals, nothing larger. A stranger may send as much before it is known.
MAX_BACKWARD_BYTES = MAX_HEADER_BYTES
# A stage says some kilobytes a second. A caller may send this much besides.
CALLER_BURST_BYTES = 4 * MAX_BACKWARD_BYTES
CALLER_BYTES_PER_S = MAX_BACKWARD_BYTES / 4
CALLERS_BURST_BYTES = 16 * CALLER_BURST_BYTES  # all callers together
# The most of its time that the ring's thread looks at callers. Many of them are looked at less often.
MAX_SHARE_OF_LOOKS = 0.1
MAX_EVENTS_PER_READ = 256

_EVENTS = BAD_HANDSHAKES | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_KEY_HANDSHAKES = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Callers:
    """See the module.

    Args:
        router: the socket that they call; belongs to the transport.
        has_key: whether they need the ring's key.
    """

    def __init__(self, context: Context, router: Socket, *, has_key: bool) -> None:
        self._has_key = has_key
        self._router = router
        self._intakes: dict[int, Intake] = {}  # by descriptor
        self._descriptors: dict[bytes, int] = {}  # by peer, of those over TCP that have said something
        self._outflows: dict[bytes, Outflow] = {}  # by peer, of those that were answered
        self._next_look_at = 0.0
        self._next_look_at_outflows = 0.0
        address = f"inproc://stagewire-monitor-{id(router)}"
        router.monitor(address, _EVENTS)
        self.monitor = context.socket(zmq.PAIR)
        # Its queue has no bound: libzmq's I/O thread would wait for room in it, and answer nobody meanwhile.
        self.monitor.setsockopt(zmq.RCVHWM, 0)
        self.monitor.connect(address)

    def close(self) -> None:
        self._router.disable_monitor()
        self.monitor.close(0)

    # ---- who comes and goes ----------------------------------------------------------------------------------------

    def read_monitor(self) -> Iterator[Event]:
        """Call it when ``monitor`` is readable."""
        for _ in range(MAX_EVENTS_PER_READ):
            if not self.monitor.poll(0):
                return
            news = recv_monitor_message(self.monitor)
            event, descriptor, where = news["event"], news["value"], news["endpoint"]
            if event == zmq.EVENT_DISCONNECTED:
                self._forget(descriptor)
            elif event != zmq.EVENT_ACCEPTED:
                yield BadHandshake(Side.SUCCESSOR, self._describe_failure(event))
            elif where.startswith(b"tcp://"):
                ports = Ports(own=int(where.rpartition(b":")[2]))
                self._intakes[descriptor] = Intake(descriptor, ports, CALLER_BYTES_PER_S)

    def _forget(self, descriptor: int) -> None:
        self._intakes.pop(descriptor, None)
        for peer in [peer for peer, other in self._descriptors.items() if other == descriptor]:
            del self._descriptors[peer]
            self._outflows.pop(peer, None)

    def _describe_failure(self, event: int) -> str:
        if not self._has_key or not event & _KEY_HANDSHAKES:
            return ""
        return f"a connection without the key in this stage's {KEY_FILE_FLAG}"

    def has_said(self, peer: bytes, frame: zmq.Frame) -> None:
        """Notes which connection a peer has, as libzmq says with its message."""
        if peer in self._descriptors:
            return
        with contextlib.suppress(zmq.ZMQError):
            descriptor = int(frame.get(zmq.SRCFD))
            if descriptor in self._intakes:
                self._descriptors[peer] = descriptor

    def is_answered(self, peer: bytes) -> None:
        """Something is sent to it. From now on `look` checks whether that arrives."""
        if peer in self._outflows:
            return
        descriptor = self._descriptors.get(peer)
        intake = self._intakes.get(descriptor) if descriptor is not None else None
        if intake is not None:
            self._outflows[peer] = Outflow(intake.descriptor, intake.ports)

    # ---- looking at all of them ------------------------------------------------------------------------------------

    def look(self, now: float) -> Iterator[Event]:
        """Ends the connections that bring too much, or by which nothing arrives. Call it several times a second."""
        if now >= self._next_look_at_outflows:
            self._next_look_at_outflows = now + timeouts.STALL_LOOK_INTERVAL_S
            yield from self._end_stalled(now)
        if now >= self._next_look_at:
            began_s = time.thread_time()
            yield from self._hang_up_on_floods(now)
            self._next_look_at = now + (time.thread_time() - began_s) / MAX_SHARE_OF_LOOKS

    def _end_stalled(self, now: float) -> Iterator[Event]:
        for peer, outflow in list(self._outflows.items()):
            stall = outflow.look(now)
            if stall is not None and stall.seconds >= timeouts.STALL_S and outflow.hang_up():
                yield Stalled(Side.SUCCESSOR, peer, stall)
            elif not outflow.is_gone:
                continue
            del self._outflows[peer]

    def _hang_up_on_floods(self, now: float) -> Iterator[Event]:
        """Ends each caller that sends too much alone, then, while all together do, the one that sends the most."""
        brought = sorted(((intake.look(now), intake) for intake in self._intakes.values()), key=lambda pair: -pair[0])
        total = sum(num_bytes for num_bytes, _ in brought)
        for num_bytes, intake in brought:
            if num_bytes > CALLER_BURST_BYTES or total > CALLERS_BURST_BYTES:
                if not intake.hang_up():
                    continue
                total -= num_bytes
                yield BadHandshake(Side.SUCCESSOR, "a connection that sends more than a stage has to say")
            elif not intake.is_gone:
                continue
            self._intakes.pop(intake.descriptor, None)
