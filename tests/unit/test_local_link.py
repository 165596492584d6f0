"""What the ranks of a stage say to each other, over real pipes; processes are fakes that live and die when told."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from stagewire.errors import ConfigError, InternalError, ProtocolError, RankError
from stagewire.vllm_plugin.ranks.local_link import (
    ALIGNMENT,
    MAX_FRAMES,
    Block,
    CallDone,
    Done,
    Follower,
    Followers,
    LeaderLink,
    RunCall,
    RunSample,
    RunStep,
    encode_failure,
)
from stagewire.wire.messages import TensorSpec

STEP = RunStep(7, [TensorSpec("hidden_states", "float32", [2, 4])])


@dataclass
class FakeProcess:
    pid: int
    exitcode: int | None = None
    joined: list[float | None] = field(default_factory=list)
    on_join: Callable[[], None] = lambda: None

    def join(self, timeout: float | None = None) -> None:
        self.joined.append(timeout)
        self.on_join()

    def kill(self) -> None:
        self.exitcode = -9


@dataclass
class Stage:
    """A leader with two followers whose ends are in this process."""

    now: float = 100.0

    def __post_init__(self) -> None:
        self.processes = [FakeProcess(201), FakeProcess(202)]
        self.theirs: list[LeaderLink] = []
        block = Block()
        self.failures: list[Any] = []
        followers = []
        for rank, process in enumerate(self.processes, 1):
            ours, their_end = multiprocessing.Pipe()
            words, their_words = multiprocessing.Pipe(duplex=False)
            self.theirs.append(LeaderLink(their_end, block))
            self.failures.append(their_words)
            followers.append(Follower(rank, process, ours, words))
        self.leader = Followers(followers, block, lambda: self.now)


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.mark.parametrize(
    ("message", "frames"),
    [
        (STEP, [b"schedule", b"\1" * 32]),
        (RunStep(0, []), [b"schedule"]),
        (RunSample(), []),
        (RunSample(), [b"bitmask"]),
        (RunCall("sleep", 3), [b"arguments"]),
        (RunStep(2**64 - 1, []), [b"", bytes(range(256)) * 4096, b"x"]),
    ],
)
def test_every_follower_gets_every_request(stage: Stage, message: Any, frames: list[bytes]) -> None:
    stage.leader.send(message, frames)
    for link in stage.theirs:
        got, views = link.receive()
        assert (got, [bytes(view) for view in views]) == (message, frames)


def test_frames_are_aligned_and_can_be_written_to(stage: Stage) -> None:
    """As torch wants them."""
    stage.leader.send(STEP, [memoryview(b"schedule"), b"1" * 100, b"2"])
    _, frames = stage.theirs[0].receive()
    frames[2][0] = 0
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(frame)) for frame in frames]
    assert [address % ALIGNMENT for address in addresses] == [0, 0, 0]


def test_frames_stay_until_all_have_answered(stage: Stage) -> None:
    """A tail may be told to sample before it has taken in the step; what comes after the answers uses their place."""
    stage.leader.send(STEP, [b"schedule", b"tensor"])
    stage.leader.send(RunSample(), [b"bitmask"])
    links = stage.theirs
    assert [[bytes(frame) for frame in link.receive()[1]] for link in links] == [[b"schedule", b"tensor"]] * 2
    assert [[bytes(frame) for frame in link.receive()[1]] for link in links] == [[b"bitmask"]] * 2
    for link in links:
        link.answer(Done(1))
        link.answer(Done(2))
    stage.leader.settle(1, 2)
    stage.leader.send(STEP, [b"another"])
    (frame,) = links[0].receive()[1]
    (same,) = links[1].receive()[1]
    frame[:1] = b"A"
    assert bytes(same) == b"Another", "one block for all"
    assert stage.leader.used_bytes == ALIGNMENT


def test_the_block_reaches_a_process_that_is_spawned() -> None:
    block = Block()
    block.grow(8)
    block.view(0, 8)[:] = b"leader.."
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer_in_block, args=(block, there))
    process.start()
    there.close()
    assert here.recv_bytes() == b"done"
    process.join(20)
    assert bytes(block.view(0, 8)) == b"follower"
    assert bytes(block.view(5000, 4)) == b"more"


def answer_in_block(block: Block, connection: Any) -> None:
    assert bytes(block.view(0, 8)) == b"leader.."
    block.view(0, 8)[:] = b"follower"
    block.grow(5004)
    block.view(5000, 4)[:] = b"more"
    connection.send_bytes(b"done")


def test_answers_come_in_the_order_of_ranks(stage: Stage) -> None:
    stage.leader.send(RunCall("sleep", 0), [b"x"])
    stage.theirs[1].answer(CallDone("ValueError", "no", b"2"))
    stage.theirs[0].answer(CallDone("", "", b"1"))
    assert stage.leader.answers() == [CallDone("", "", b"1"), CallDone("ValueError", "no", b"2")]


def test_digests_of_all_ranks_are_compared(stage: Stage) -> None:
    for link in stage.theirs:
        link.answer(Done(5))
        link.answer(Done(6))
    stage.leader.settle(5, 6)
    stage.theirs[0].answer(Done(5))
    stage.theirs[1].answer(Done(4))
    with pytest.raises(RankError, match=r"rank 2 \(pid 202\) has other rows or tokens than rank 0"):
        stage.leader.settle(5)


@pytest.mark.parametrize("take", ["settle", "answers"])
def test_an_answer_to_something_else(stage: Stage, take: str) -> None:
    for link in stage.theirs:
        link.answer(CallDone("", "", b"") if take == "settle" else Done(1))
    with pytest.raises(InternalError, match=r"rank 1 \(pid 201\) answered (CallDone|Done)"):
        stage.leader.settle(1) if take == "settle" else stage.leader.answers()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(STEP),
        msgspec.msgpack.encode(([], ["RunAnything"])),
        msgspec.msgpack.encode(([], Done(1))),
        msgspec.msgpack.encode(([], ["RunStep", 1, [], "more"])),
        msgspec.msgpack.encode(([(0, 65)], RunSample())),
        msgspec.msgpack.encode(([(2**62, 2**62)], RunSample())),
        msgspec.msgpack.encode(([(-1, 1)], RunSample())),
        msgspec.msgpack.encode(([(1, -1)], RunSample())),
        msgspec.msgpack.encode(([(0, 1)] * (MAX_FRAMES + 1), RunSample())),
    ],
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.send_bytes(data)
    block = Block()
    block.grow(64)
    with pytest.raises(ProtocolError):
        LeaderLink(ours, block).receive()


def test_what_is_no_answer_is_refused(stage: Stage) -> None:
    stage.theirs[0].connection.send_bytes(msgspec.msgpack.encode(["DoneOrSo", 1]))
    with pytest.raises(ProtocolError, match="between the ranks of a stage"):
        stage.leader.settle(1)


def fail_a_step(stage: Stage, error: Exception) -> None:
    with stage.leader.work("a step", 5.0):
        stage.now += 6
        raise error


class TestLoss:
    def test_nothing_is_wrong(self, stage: Stage) -> None:
        assert stage.leader.problem() is None
        with stage.leader.work("a step", 5.0):
            stage.now += 4.9
            assert stage.leader.problem() is None

    def test_a_dead_follower_is_noticed_while_idle(self, stage: Stage) -> None:
        stage.processes[1].exitcode = -9
        problem = stage.leader.problem()
        assert str(problem) == "tensor parallel rank 2 (pid 202) was killed by SIGKILL"
        assert problem is not None
        assert problem.exit_code == 1
        stage.processes[0].exitcode = 1
        assert stage.leader.problem() is problem, "the first reason stays"

    def test_its_last_words_say_more_than_its_exit_code(self, stage: Stage) -> None:
        stage.failures[0].send_bytes(encode_failure(2, "the checkpoint is damaged"))
        stage.processes[0].exitcode = 2
        problem = stage.leader.problem()
        assert str(problem) == "tensor parallel rank 1 (pid 201) failed: the checkpoint is damaged"
        assert problem is not None
        assert problem.exit_code == 2

    def test_last_words_are_heard_before_the_end(self, stage: Stage) -> None:
        """The model's thread may wait in a collective for a rank that has failed and is still alive."""
        stage.failures[1].send_bytes(encode_failure(1, "x" * 100_000 + "\ud800"))
        problem = stage.leader.problem()
        assert problem is not None
        assert len(str(problem)) < 2100

    def test_work_that_takes_too_long(self, stage: Stage) -> None:
        with stage.leader.work("a step", 5.0):
            stage.now += 5.0
            problem = stage.leader.problem()
        assert "a step did not end within 5 s: a tensor parallel rank hangs" in str(problem)
        assert "201, 202" in str(problem)

    def test_a_stage_of_one_rank_minds_its_calls_and_not_its_steps(self) -> None:
        now = 0.0
        alone = Followers([], Block(), lambda: now)
        with alone.work("a step", 5.0):
            now += 5.0
            assert alone.problem() is None
        with alone.work("the call profile", 5.0, counts_alone=True):
            now += 4.9
            assert alone.problem() is None
            now += 0.1
            assert str(alone.problem()) == "the call profile did not end within 5 s"

    def test_work_without_a_limit_and_idling_are_no_problem(self, stage: Stage) -> None:
        with stage.leader.work("loading", None):
            stage.now += 1e6
            assert stage.leader.problem() is None
        stage.now += 1e6
        assert stage.leader.problem() is None

    @pytest.mark.parametrize("what", ["send", "settle", "answers"])
    def test_an_ended_pipe_is_explained_by_its_process(self, stage: Stage, what: str) -> None:
        """Its exit code comes a moment after the end of its pipe: whoever talks to it waits for that."""
        for link in stage.theirs:
            link.connection.close()

        def dies() -> None:
            stage.processes[0].exitcode = -11

        stage.processes[0].on_join = dies
        talk: Callable[[], object] = {
            "send": lambda: stage.leader.send(STEP, [b"schedule"]),
            "settle": lambda: stage.leader.settle(1),
            "answers": stage.leader.answers,
        }[what]
        with pytest.raises(RankError, match=r"rank 1 \(pid 201\) was killed by SIGSEGV"):
            talk()
        assert all(limit is not None and limit <= 2 for limit in stage.processes[0].joined)

    def test_a_collective_that_fails_is_explained_by_who_has_ended(self, stage: Stage) -> None:
        """gloo says that a connection was closed, and its process's exit code comes a moment later."""

        def dies() -> None:
            stage.processes[1].exitcode = -9

        stage.processes[0].on_join = dies
        with pytest.raises(RankError, match=r"rank 2 \(pid 202\) was killed by SIGKILL") as caught:
            fail_a_step(stage, RuntimeError("Connection closed by peer"))
        assert isinstance(caught.value.__cause__, RuntimeError)

    @pytest.mark.parametrize("error", [RuntimeError("no such kernel"), ConfigError("no such adapter")])
    def test_an_error_of_rank_0_stays_its_own(self, stage: Stage, error: Exception) -> None:
        with pytest.raises(type(error)) as caught:
            fail_a_step(stage, error)
        assert caught.value is error

    def test_those_that_were_told_to_end_are_no_problem(self, stage: Stage) -> None:
        stage.leader.close()
        for link in stage.theirs:
            with pytest.raises(EOFError):
                link.receive()
        assert all(process.joined for process in stage.processes)
        assert [process.exitcode for process in stage.processes] == [-9, -9], "what is left is killed"
        assert stage.leader.problem() is None


def test_a_stage_of_one_has_nobody_to_wait_for() -> None:
    alone = Followers([], Block())
    with alone.work("a step", 0.0):
        alone.send(STEP, [b"schedule"])
        alone.settle(1)
        assert alone.answers() == []
        assert alone.problem() is None
    assert not alone
    alone.close()
