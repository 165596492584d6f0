"""Between the ranks of a tensor parallel stage: typed messages over one pipe to each follower, and who is gone.

Rank 0, the leader, is the process that owns the ring. It tells every follower what to run, runs its own part, and
takes one answer from each. Owns the vocabulary, its bytes, and how a follower's death or silence is noticed; knows no
torch and no vLLM. Nothing here leaves the machine, and still nothing is unpickled: frames of known sizes only.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import msgspec

from stagewire.errors import InternalError, ProtocolError, RankError
from stagewire.wire.codec import MAX_HEADER_BYTES, MAX_TENSORS, Frame
from stagewire.wire.messages import TensorSpec

__all__ = [
    "CallDone",
    "Done",
    "Follower",
    "Followers",
    "LastWords",
    "Pipe",
    "RunCall",
    "RunSample",
    "RunStep",
]

# Between the end of a process's pipe and its exit code, and for a process that was told to end.
END_S = 2.0
MAX_FRAMES = 1 + MAX_TENSORS
MAX_TEXT = 2000


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
    """Answer to RunCall; an error is its type and text. Frame: the value."""

    error_type: str
    error_text: str


class LastWords(_Struct, frozen=True):
    """Why a follower ends, on a pipe of its own: the leader's model thread may be stuck in a collective by then."""

    exit_code: int
    text: str


Request = RunStep | RunSample | RunCall
Answer = Done | CallDone

_ENCODER = msgspec.msgpack.Encoder()
# Sizes of the frames that follow, and the message.
_REQUESTS = msgspec.msgpack.Decoder(tuple[list[int], Request])
_ANSWERS = msgspec.msgpack.Decoder(tuple[list[int], Answer])
_WORDS = msgspec.msgpack.Decoder(LastWords)


def encode_words(exit_code: int, text: str) -> bytes:
    return _ENCODER.encode(LastWords(exit_code, text[:MAX_TEXT].encode("utf-8", "replace").decode()))


@dataclass(frozen=True)
class Pipe:
    """One end of a pipe.

    Args:
        connection: bytes only; `send` and `recv` of a Connection would pickle.
        max_frame_bytes: no frame may be larger.
    """

    connection: Connection[Any, Any]
    max_frame_bytes: int

    def send(self, message: Request | Answer, frames: Sequence[Frame] = ()) -> None:
        sizes = [memoryview(frame).nbytes for frame in frames]
        self.connection.send_bytes(_ENCODER.encode((sizes, message)))
        for frame in frames:
            self.connection.send_bytes(frame)

    def receive_request(self) -> tuple[Request, list[bytearray]]:
        """Raises EOFError when the leader has closed its end, ProtocolError for anything but a request."""
        request: tuple[Request, list[bytearray]] = self._receive(_REQUESTS)
        return request

    def receive_answer(self) -> tuple[Answer, list[bytearray]]:
        """Raises OSError or EOFError when the follower is gone, ProtocolError for anything but an answer."""
        answer: tuple[Answer, list[bytearray]] = self._receive(_ANSWERS)
        return answer

    def _receive(self, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
        try:
            sizes, message = decoder.decode(self.connection.recv_bytes(MAX_HEADER_BYTES))
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"malformed message between the ranks of a stage: {error}") from error
        if len(sizes) > MAX_FRAMES or not all(0 <= size <= self.max_frame_bytes for size in sizes):
            raise ProtocolError(f"a message between the ranks of a stage with frames of {sizes} bytes")
        return message, [self._receive_frame(size) for size in sizes]

    def _receive_frame(self, size: int) -> bytearray:
        """Writable, because torch wants it so."""
        frame = bytearray(size)
        if self.connection.recv_bytes_into(frame) != size:
            raise ProtocolError(f"a frame between the ranks of a stage is shorter than {size} bytes")
        return frame

    def close(self) -> None:
        self.connection.close()


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
    """One other rank as the leader has it. ``words``: where its LastWords come."""

    rank: int
    process: Process
    pipe: Pipe
    words: Connection[Any, Any]

    def __str__(self) -> str:
        return f"tensor parallel rank {self.rank} (pid {self.process.pid})"


class Followers:
    """All followers of a stage. `problem` is for the ring's thread, the rest for the one that runs the model.

    A forward pass of several ranks meets in collectives that wait for ever, so the model's thread cannot notice by
    itself that a peer is gone. Whoever polls `problem` does, and ends the stage.

    Args:
        followers: in the order of their ranks, 1 and up; none in a stage of one.
        clock: monotonic, seconds.
    """

    def __init__(self, followers: Sequence[Follower], clock: Callable[[], float] = time.monotonic) -> None:
        self._followers = followers
        self._clock = clock
        self._busy: tuple[str, float, float | None] | None = None  # what, since when, limit in seconds
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
    def work(self, what: str, limit_s: float | None) -> Iterator[None]:
        """While the ranks work on ``what``; for longer than ``limit_s`` it is a problem. None: as long as it takes."""
        self._busy = (what, self._clock(), limit_s)
        try:
            yield
        finally:
            self._busy = None

    @contextlib.contextmanager
    def _talk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as error:
            raise self._why_gone() from error

    def send(self, message: Request, frames: Sequence[Frame] = ()) -> None:
        """To every follower. Raises RankError when one is gone, as `settle` and `answers` do."""
        with self._talk():
            for each in self._followers:
                each.pipe.send(message, frames)

    def settle(self, *digests: int) -> None:
        """Takes a Done for each of the last messages, oldest first, and compares it with rank 0's digest.

        Raises:
            RankError: also when a rank has other rows than rank 0, or sampled other tokens: its answer would be wrong.
        """
        for each in self._followers:
            for digest in digests:
                with self._talk():
                    answer, _ = each.pipe.receive_answer()
                if not isinstance(answer, Done):
                    raise InternalError(f"{each} answered {type(answer).__name__} in place of Done")
                if answer.digest != digest:
                    raise RankError(f"{each} has other rows or tokens than rank 0")

    def answers(self) -> list[tuple[CallDone, Frame]]:
        """To a RunCall, in the order of ranks."""
        taken: list[tuple[CallDone, Frame]] = []
        for each in self._followers:
            with self._talk():
                answer, frames = each.pipe.receive_answer()
            if not isinstance(answer, CallDone) or len(frames) != 1:
                raise InternalError(f"{each} answered {type(answer).__name__} with {len(frames)} frames to a call")
            taken.append((answer, frames[0]))
        return taken

    def _why_gone(self) -> RankError:
        """A pipe has ended: its process says why, or its exit code will, in a moment."""
        ends_at = time.monotonic() + END_S
        for each in self._followers:
            problem = self.problem()
            if problem is not None:
                return problem
            each.process.join(max(0.0, ends_at - time.monotonic()) / len(self._followers))
        return self.problem() or RankError("a tensor parallel rank closed its pipe")

    # ---- any thread ------------------------------------------------------------------------------------------------

    def problem(self) -> RankError | None:
        """Why this stage cannot go on, once that is so: a follower has ended, or work takes too long."""
        with self._lock:
            if self._problem is None and not self._is_ending:
                self._problem = self._find_problem()
            return self._problem

    def _find_problem(self) -> RankError | None:
        for each in self._followers:
            exit_code = each.process.exitcode  # before the words, which were written before the end
            if each.words.poll(0):
                with contextlib.suppress(EOFError, OSError, msgspec.MsgspecError):
                    words = _WORDS.decode(each.words.recv_bytes(MAX_HEADER_BYTES))
                    return RankError(f"{each} failed: {words.text}", words.exit_code)
            if exit_code is not None:
                return RankError(f"{each} {_describe_exit(exit_code)}")
        return self._find_delay()

    def _find_delay(self) -> RankError | None:
        busy = self._busy
        if not self._followers or busy is None:
            return None
        what, since, limit_s = busy
        if limit_s is None or self._clock() - since < limit_s:
            return None
        pids = ", ".join(map(str, self.pids))
        return RankError(
            f"{what} did not end within {limit_s:.0f} s: a tensor parallel rank hangs or is "
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
            each.pipe.close()
        ends_at = time.monotonic() + END_S
        for each in self._followers:
            each.process.join(max(0.0, ends_at - time.monotonic()))
        self.kill()


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"
