"""How much a connection has brought, and its end."""

import socket
import threading

from stagewire.ring.transport.tcp_counters import Intake, Ports

DEADLINE_S = 30.0


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        caller = socket.create_connection(server.getsockname(), DEADLINE_S)
        accepted, _ = server.accept()
    accepted.settimeout(DEADLINE_S)
    return caller, accepted


def test_what_came_beyond_a_whole_message_and_an_allowance() -> None:
    caller, accepted = pair()
    with caller, accepted:
        intake = Intake(accepted.fileno(), Ports(own=accepted.getsockname()[1]), allowed_per_s=10.0)
        caller.sendall(bytes(1000))
        accepted.recv(1000, socket.MSG_WAITALL)
        assert intake.look(0.0) == 1000
        assert intake.look(2.0) == 980
        intake.took_message()
        assert intake.look(2.0) == 0


def test_another_connection_under_its_descriptor_is_left_alone() -> None:
    caller, accepted = pair()
    with caller, accepted:
        intake = Intake(accepted.fileno(), Ports(peer=1), allowed_per_s=0.0)
        assert intake.hang_up()
        assert intake.look(0.0) == 0
        assert intake.is_gone
        caller.sendall(b"still here")
        assert accepted.recv(10, socket.MSG_WAITALL) == b"still here"


def test_a_caller_that_waits_for_room_learns_that_it_was_hung_up_on() -> None:
    """After an end in order it would wait on: our side announces no more room, and drops the probes that ask for it."""
    caller, accepted = pair()
    ended = threading.Event()
    has_begun = threading.Event()
    sent: list[int] = []

    def pour() -> None:
        try:
            while True:
                sent.append(caller.send(bytes(1 << 19)))
                has_begun.set()
        except TimeoutError:
            return
        except OSError:
            ended.set()

    with caller, accepted:
        intake = Intake(accepted.fileno(), Ports(own=accepted.getsockname()[1]))
        caller.settimeout(0.2)  # until there is no room
        pour()
        assert has_begun.is_set()
        caller.settimeout(DEADLINE_S)
        thread = threading.Thread(target=pour)
        thread.start()
        assert intake.hang_up()
        while accepted.recv(8192):  # as ZeroMQ does, which reads to the end before it closes
            pass
        accepted.close()
        thread.join()
        assert ended.is_set()
