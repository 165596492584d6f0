"""Between the ranks of a tensor parallel stage: typed messages over one pipe to each follower, and who is gone.

Rank 0, the leader, is the process that owns the ring. It tells every follower what to run, runs its own part, and
takes one answer from each. What comes with a request (a schedule, tensors) lies in a block of memory that all of them
map: written once, whatever the number of followers, and not again before all have answered. Owns the vocabulary, its
bytes, and how a follower's death or silence is noticed; knows no torch and no vLLM. Nothing here leaves the machine,
and still nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any, Protocol

import msgspec

from stagewire.errors import InternalError, ProtocolError, RankError, StagewireError
from stagewire.observe.processes import describe_exit
from stagewire.wire.codec import MAX_HEADER_BYTES, MAX_TENSORS, Frame
from stagewire.wire.messages import TensorSpec

__all__ = [
    "Block",
    "CallDone",
    "Done",
    "Follower",
    "FollowerFailure",
    "Followers",
    "LeaderLink",
    "RunCall",
    "RunSample",
    "RunStep",
]

# Between the end of a process's pipe and its exit code, and for a process that was told to end.
END_S = 2.0
MAX_FRAMES = 1 + MAX_TENSORS
ALIGNMENT = 64
MAX_TEXT = 2000
# The values of calls: a few kilobytes for each layer of the model.
MAX_ANSWER_BYTES = 64 << 20


class _Struct(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


class RunStep(_Struct, frozen=True):
    """Frames: the schedule as it travelled, then one per tensor. ``digest`` is of the head's rows; 0 on the head."""

    digest: int
    specs: list[TensorSpec]


class RunSample(_Struct, frozen=True):
    """Sample the step that was run last. Frames: the grammar bitmask, if any."""


class RunCall(_Struct, frozen=True):
    """Frame: the arguments. ``first_rank``: how many workers the earlier stages have."""

    method: str
    first_rank: int


class Done(_Struct, frozen=True):
    """Answer to RunStep (digest of the rows) and RunSample (of the tokens), and the first word: loaded."""

    digest: int


class CallDone(_Struct, frozen=True):
    """Answer to RunCall; an error is its type and text, the value is of call_codec.encode_value."""

    error_type: str
    error_text: str
    value: bytes


class FollowerFailure(_Struct, frozen=True):
    """Why a follower ends, on a pipe of its own: the leader's model thread may be stuck in a collective by then."""

    exit_code: int
    text: str


Request = RunStep | RunSample | RunCall
Answer = Done | CallDone

_ENCODER = msgspec.msgpack.Encoder()
# Where in the block its frames lie, as (offset, size), and the message.
_REQUESTS = msgspec.msgpack.Decoder(tuple[list[tuple[int, int]], Request])
_ANSWERS = msgspec.msgpack.Decoder(Answer)
_FAILURES = msgspec.msgpack.Decoder(FollowerFailure)


def encode_failure(exit_code: int, text: str) -> bytes:
    return _ENCODER.encode(FollowerFailure(exit_code, text[:MAX_TEXT].encode("utf-8", "replace").decode()))


class Block:
    """Memory without a name that a leader and its followers map; it grows, and goes with the last of them.

    Travels to a process that is being spawned, and only there.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._file = os.fdopen(os.memfd_create("stagewire-ranks") if descriptor is None else descriptor, "r+b", 0)
        self._map: mmap.mmap | None = None
        self.grow(ALIGNMENT)  # never empty, or it could not be mapped

    def __reduce__(self) -> tuple[Callable[[Any], Block], tuple[Any]]:
        return _receive_block, (DupFd(self._file.fileno()),)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def grow(self, num_bytes: int) -> None:
        if num_bytes > self.num_bytes:
            self._file.truncate(num_bytes)

    def view(self, offset: int, size: int) -> memoryview:
        """Raises ProtocolError for what is not in the block."""
        if self._map is None or offset + size > len(self._map):
            total = self.num_bytes
            if offset + size > total:
                raise ProtocolError(f"bytes {offset} to {offset + size} of a block of {total} bytes between ranks")
            self._map = mmap.mmap(self._file.fileno(), total)  # the old one lives as long as a view of it
        return memoryview(self._map)[offset : offset + size]


def _receive_block(descriptor: Any) -> Block:
    return Block(descriptor.detach())


@dataclass(frozen=True)
class LeaderLink:
    """A follower's end. ``connection`` for bytes only: its `send` and `recv` would pickle."""

    connection: Connection[Any, Any]
    block: Block

    def receive(self) -> tuple[Request, list[memoryview]]:
        """The next request; its frames are valid, and may be written to, until it is answered.

        Raises:
            EOFError: the leader has closed its end.
            ProtocolError: anything but a request.
        """
        places, request = _decode(_REQUESTS, self.connection.recv_bytes(MAX_HEADER_BYTES))
        if len(places) > MAX_FRAMES or any(offset < 0 or size < 0 for offset, size in places):
            raise ProtocolError(f"a request with frames at {places[:MAX_FRAMES]} between the ranks of a stage")
        return request, [self.block.view(offset, size) for offset, size in places]

    def answer(self, answer: Answer) -> None:
        self.connection.send_bytes(_ENCODER.encode(answer))


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"malformed message between the ranks of a stage: {error}") from error


class Process(Protocol):
    """Of a multiprocessing process, what is needed here."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exitcode(self) -> int | None: ...

    def join(self, timeout: float | None = None) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class Follower:
    """One other rank as the leader has it. ``connection`` is for requests and answers, bytes only. Its
    FollowerFailure comes on ``failures``.
    """

    rank: int
    process: Process
    connection: Connection[Any, Any]
    failures: Connection[Any, Any]

    def __str__(self) -> str:
        return f"tensor parallel rank {self.rank} (pid {self.process.pid})"


@dataclass(frozen=True)
class _Work:
    """What the ranks are at, since when by the followers' clock, and for how many seconds at most."""

    what: str
    began_at: float
    limit_s: float | None


class Followers:
    """All followers of a stage. `problem` is for the ring's thread, the rest for the one that runs the model.

    A forward pass of several ranks meets in collectives that wait for ever, or say only that a connection has ended, so
    the model's thread cannot notice by itself which peer is gone and why. Whoever polls `problem` does, and ends the
    stage.

    Args:
        followers: in the order of their ranks, 1 and up; none in a stage of one.
        block: where frames are laid for them.
        clock: monotonic, seconds.
    """

    def __init__(
        self, followers: Sequence[Follower], block: Block, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._followers = followers
        self._block = block
        self.used_bytes = 0  # of the block, by requests that not everybody has answered
        self._clock = clock
        self._busy: _Work | None = None
        self._lock = threading.Lock()
        self._problem: RankError | None = None
        self._is_ending = False

    def __repr__(self) -> str:
        return f"Followers({', '.join(map(str, self._followers)) or 'none'}; {self._busy or 'idle'})"

    def __len__(self) -> int:
        return len(self._followers)

    @property
    def pids(self) -> list[int]:
        return [each.process.pid for each in self._followers if each.process.pid is not None]

    # ---- the model's thread ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def work(self, what: str, limit_s: float | None, *, counts_alone: bool = False) -> Iterator[None]:
        """While the ranks work on ``what``; for longer than ``limit_s`` it is a problem. None: as long as it takes.

        ``counts_alone``: without followers too.

        Raises:
            RankError: in place of an error of the work, when a follower has ended: a collective's tells nothing of why.
        """
        if self._followers or counts_alone:
            self._busy = _Work(what, self._clock(), limit_s)
        try:
            yield
        except StagewireError:
            raise
        except Exception as error:
            self._busy = None  # it has ended, so it cannot take too long any more
            problem = self._await_problem()
            if problem is None:
                raise
            raise problem from error
        finally:
            self._busy = None

    @contextlib.contextmanager
    def _talk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as error:
            raise self._await_problem() or RankError("a tensor parallel rank closed its pipe") from error

    def send(self, message: Request, frames: Sequence[Frame] = ()) -> None:
        """To every follower. Raises RankError when one is gone, as `settle` and `answers` do."""
        if not self._followers:
            return
        header = _ENCODER.encode((self._lay(frames), message))
        with self._talk():
            for each in self._followers:
                each.connection.send_bytes(header)

    def _lay(self, frames: Sequence[Frame]) -> list[tuple[int, int]]:
        """Copies frames into the block; returns offset and size of each."""
        views = [memoryview(frame).cast("B") for frame in frames]
        places = []
        for view in views:
            places.append((self.used_bytes, view.nbytes))
            self.used_bytes += -(-view.nbytes // ALIGNMENT) * ALIGNMENT
        self._block.grow(self.used_bytes)
        for (offset, size), view in zip(places, views, strict=True):
            self._block.view(offset, size)[:] = view
        return places

    def settle(self, *digests: int) -> None:
        """Takes a Done for each of the requests since the last time, and compares it with rank 0's digest of it.

        Raises:
            RankError: also when a rank has other rows than rank 0, or sampled other tokens: its answer would be wrong.
        """
        for each in self._followers:
            for digest in digests:
                answer = self._receive(each)
                if not isinstance(answer, Done):
                    raise InternalError(f"{each} answered {type(answer).__name__} in place of Done")
                if answer.digest != digest:
                    raise RankError(f"{each} has other rows or tokens than rank 0")
        self.used_bytes = 0

    def answers(self) -> list[CallDone]:
        """To a RunCall, in the order of ranks."""
        taken: list[CallDone] = []
        for each in self._followers:
            answer = self._receive(each)
            if not isinstance(answer, CallDone):
                raise InternalError(f"{each} answered {type(answer).__name__} to a call")
            taken.append(answer)
        self.used_bytes = 0
        return taken

    def _receive(self, follower: Follower) -> Answer:
        with self._talk():
            data = follower.connection.recv_bytes(MAX_ANSWER_BYTES)
        answer: Answer = _decode(_ANSWERS, data)
        return answer

    def _await_problem(self) -> RankError | None:
        """Something between the ranks has ended: a process says why, or its exit code will, in a moment."""
        ends_at = time.monotonic() + END_S
        for each in self._followers:
            problem = self.problem()
            if problem is not None:
                return problem
            each.process.join(max(0.0, ends_at - time.monotonic()) / len(self._followers))
        return self.problem()

    # ---- any thread ------------------------------------------------------------------------------------------------

    def problem(self) -> RankError | None:
        """Why this stage cannot go on, once that is so: a follower has ended, or work takes too long."""
        with self._lock:
            if self._problem is None and not self._is_ending:
                self._problem = self._find_problem()
            return self._problem

    def _find_problem(self) -> RankError | None:
        for each in self._followers:
            exit_code = each.process.exitcode  # before its failure, which it wrote before it ended
            if each.failures.poll(0):
                with contextlib.suppress(EOFError, OSError, msgspec.MsgspecError):
                    failure = _FAILURES.decode(each.failures.recv_bytes(MAX_HEADER_BYTES))
                    return RankError(f"{each} failed: {failure.text}", failure.exit_code)
            if exit_code is not None:
                return RankError(f"{each} {describe_exit(exit_code)}")
        return self._find_delay()

    def _find_delay(self) -> RankError | None:
        work = self._busy
        if work is None or work.limit_s is None or self._clock() - work.began_at < work.limit_s:
            return None
        if not self._followers:
            return RankError(f"{work.what} did not end within {work.limit_s:.0f} s")
        pids = ", ".join(map(str, self.pids))
        return RankError(
            f"{work.what} did not end within {work.limit_s:.0f} s: a tensor parallel rank hangs or is "
            f"too slow (rank 0 is this process, the others are pids {pids})"
        )

    def kill(self) -> None:
        """At once; may be called again."""
        self._is_ending = True
        for each in self._followers:
            with contextlib.suppress(OSError, ValueError):
                each.process.kill()

    def close(self) -> None:
        """In order: the end of its pipe tells a follower to finish."""
        self._is_ending = True
        for each in self._followers:
            each.connection.close()
        ends_at = time.monotonic() + END_S
        for each in self._followers:
            each.process.join(max(0.0, ends_at - time.monotonic()))
        self.kill()
