"""Between the ranks of a tensor parallel stage: typed messages over a pipe to each follower, and which one has ended.

Rank 0, the leader, is the process that owns the ring. It tells every follower what to run, runs its own part, and takes
one answer from each. The frames of a request (a schedule, tensors) lie in a block of memory that all ranks map. The
leader writes them once for all followers, and writes again only when all have answered.

Owns the messages, their bytes, and how a follower's end or a deadline is noticed. Knows no torch and no vLLM. Nothing
here leaves the machine, and yet no message is unpickled.
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

# How long a process may take from the end of its pipe to its exit code, and to end once it was told to.
END_S = 2.0
MAX_FRAMES = 1 + MAX_TENSORS
ALIGNMENT = 64
MAX_TEXT = 2000
# The largest answers are values of calls, with a few kilobytes for each layer of the model.
MAX_ANSWER_BYTES = 64 << 20


class _Struct(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


class RunStep(_Struct, frozen=True):
    """Run a step. Frames: the schedule's bytes, then one per tensor. ``digest``: of the head's rows; 0 on the head."""

    digest: int
    specs: list[TensorSpec]


class RunSample(_Struct, frozen=True):
    """Sample from the last step. Frames: the grammar bitmask, if there is one."""


class RunCall(_Struct, frozen=True):
    """Run a call. Frame: its arguments. ``first_rank``: how many workers the earlier stages have."""

    method: str
    first_rank: int


class Done(_Struct, frozen=True):
    """Answer to RunStep (digest of the rows) and RunSample (of the tokens). The first one, with 0, says: loaded."""

    digest: int


class CallDone(_Struct, frozen=True):
    """Answer to RunCall: an error's type and text, empty without one, and a value by `codec.values.encode_value`."""

    error_type: str
    error_text: str
    value: bytes


class FollowerFailure(_Struct, frozen=True):
    """Why a follower ends. It has a pipe of its own, because the leader's model thread may be stuck in a collective."""

    exit_code: int
    text: str


Request = RunStep | RunSample | RunCall
Answer = Done | CallDone

_ENCODER = msgspec.msgpack.Encoder()
# The places of the frames in the block, as (offset, size), and the request.
_REQUESTS = msgspec.msgpack.Decoder(tuple[list[tuple[int, int]], Request])
_ANSWERS = msgspec.msgpack.Decoder(Answer)
_FAILURES = msgspec.msgpack.Decoder(FollowerFailure)


def encode_failure(exit_code: int, text: str) -> bytes:
    return _ENCODER.encode(FollowerFailure(exit_code, text[:MAX_TEXT].encode("utf-8", "replace").decode()))


class Block:
    """Unnamed memory that a leader and its followers map. It grows, and is freed with the last of these processes.

    It is pickled only for a process that is being spawned.

    Args:
        descriptor: of existing memory; by default it is new.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._file = os.fdopen(os.memfd_create("stagewire-ranks") if descriptor is None else descriptor, "r+b", 0)
        self._map: mmap.mmap | None = None
        self.grow(ALIGNMENT)  # an empty file cannot be mapped

    def __reduce__(self) -> tuple[Callable[[Any], Block], tuple[Any]]:
        return _receive_block, (DupFd(self._file.fileno()),)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def grow(self, num_bytes: int) -> None:
        if num_bytes > self.num_bytes:
            self._file.truncate(num_bytes)

    def view(self, offset: int, size: int) -> memoryview:
        """The ``size`` bytes at ``offset``. Raises ProtocolError if they are not in the block."""
        if self._map is None or offset + size > len(self._map):
            total = self.num_bytes
            if offset + size > total:
                raise ProtocolError(f"bytes {offset} to {offset + size} of a block of {total} bytes between ranks")
            self._map = mmap.mmap(self._file.fileno(), total)  # views keep the old map alive
        return memoryview(self._map)[offset : offset + size]


def _receive_block(descriptor: Any) -> Block:
    return Block(descriptor.detach())


@dataclass(frozen=True)
class LeaderLink:
    """A follower's end. Only bytes go over ``connection``: its `send` and `recv` would pickle."""

    connection: Connection[Any, Any]
    block: Block

    def receive(self) -> tuple[Request, list[memoryview]]:
        """The next request and its frames. These are valid, and may be written to, until the request is answered.

        Raises:
            EOFError: the leader has closed its end.
            ProtocolError: the message is not a request.
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
    """What is needed here of a process of multiprocessing."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exitcode(self) -> int | None: ...

    def join(self, timeout: float | None = None) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class Follower:
    """A rank above 0 as its leader sees it.

    Args:
        rank: 1 and up.
        process: its process.
        connection: for requests and answers, as bytes only.
        failures: where its FollowerFailure arrives.
    """

    rank: int
    process: Process
    connection: Connection[Any, Any]
    failures: Connection[Any, Any]

    def __str__(self) -> str:
        return f"tensor parallel rank {self.rank} (pid {self.process.pid})"


@dataclass(frozen=True)
class _Work:
    """What the ranks do now. ``began_at``: by the clock of `Followers`. ``limit_s``: in seconds; None: no limit."""

    what: str
    began_at: float
    limit_s: float | None


class Followers:
    """All followers of a stage. Any thread may call `problem` and `kill`, only the model's thread the other methods.

    In a forward pass of several ranks, collectives wait for ever, or report only that a connection has ended. So the
    model's thread cannot tell which rank has ended and why. The ring's thread polls `problem` and ends the stage.

    Args:
        followers: in the order of their ranks, 1 and up; none in a stage of one rank.
        block: where frames are laid for them.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, followers: Sequence[Follower], block: Block, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._followers = followers
        self._block = block
        self.used_bytes = 0  # of the block, by requests that not all followers have answered
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
        """Around what the ranks do together. It is a problem if it takes longer than ``limit_s``.

        Args:
            what: names the work in an error.
            limit_s: in seconds; None: no limit.
            counts_alone: whether the limit also holds without followers.

        Raises:
            RankError: a follower has ended. It replaces an error of the work, because a collective's does not say why.
        """
        if self._followers or counts_alone:
            self._busy = _Work(what, self._clock(), limit_s)
        try:
            yield
        except StagewireError:
            raise
        except Exception as error:
            self._busy = None  # the work has ended: its limit must not become the problem while this waits
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
        """Sends a request to every follower. Raises RankError when one has ended, as `settle` and `answers` do."""
        if not self._followers:
            return
        header = _ENCODER.encode((self._lay(frames), message))
        with self._talk():
            for each in self._followers:
                each.connection.send_bytes(header)

    def _lay(self, frames: Sequence[Frame]) -> list[tuple[int, int]]:
        """Copies frames into the block. Returns offset and size of each."""
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
        """Takes a Done from every follower for each request since the last time, and compares it with rank 0's digest.

        Args:
            digests: rank 0's own, one for each of these requests.

        Raises:
            RankError: a rank has ended, or has other rows or tokens than rank 0, so that its answer would be wrong.
            InternalError: a rank answered another kind of request.
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
        """The followers' answers to a RunCall, in the order of ranks."""
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
        """After an error between the ranks: its cause, for which it waits up to `END_S`; None if there is none."""
        ends_at = time.monotonic() + END_S
        for each in self._followers:
            problem = self.problem()
            if problem is not None:
                return problem
            each.process.join(max(0.0, ends_at - time.monotonic()) / len(self._followers))
        return self.problem()

    # ---- any thread ------------------------------------------------------------------------------------------------

    def problem(self) -> RankError | None:
        """Why this stage cannot go on: a follower has ended, or the work takes too long. None while it can."""
        with self._lock:
            if self._problem is None and not self._is_ending:
                self._problem = self._find_problem()
            return self._problem

    def _find_problem(self) -> RankError | None:
        for each in self._followers:
            exit_code = each.process.exitcode  # read before the failure, which was written before the end
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
        """Ends all followers at once. May be called again."""
        self._is_ending = True
        for each in self._followers:
            with contextlib.suppress(OSError, ValueError):
                each.process.kill()

    def close(self) -> None:
        """Ends all followers in order, by closing their pipes. Kills those that have not ended after `END_S`."""
        self._is_ending = True
        for each in self._followers:
            each.connection.close()
        ends_at = time.monotonic() + END_S
        for each in self._followers:
            each.process.join(max(0.0, ends_at - time.monotonic()))
        self.kill()
