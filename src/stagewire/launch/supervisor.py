"""Starts local stages, watches them, starts them again, stops them in order. One loop over one queue of events.

Owns the queue, signals and deadlines. What the stages are started with (launch/spec.py), what follows from an end
(launch/restarts.py) and what is drawn (commands/screen.py) is decided elsewhere.

    status message ──┐
    child's exit   ──┼──> queue ──> run(): starting ──> first request ──> serving ──> stop: head, then the rest
    signal         ──┤                 └─ a stage failed, or a deadline passed ──────────^
    first answer   ──┤                                                       │
    back-off over  ──┘                 a stage ended: it is started again, after a pause that grows, unless it has
                                       ended too often without having been ready for long

Before the first answer a stage that ends stops everything: what is wrong then would be wrong again. After it, if asked
to, a second process of each stage but the head is started that stands by. It takes the place of the first one when that
ends, and a new one stands by for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from stagewire.errors import PeerError, StagewireError
from stagewire.launch.api import Api, Served
from stagewire.launch.local_stage import LocalStage, Progress, StageFailed, is_cause_known, root_cause, start_stage
from stagewire.launch.loop import take_signals
from stagewire.launch.orphans import reap_orphans
from stagewire.launch.pace import deadline, io_bytes
from stagewire.launch.restarts import Follows, count_failures, pause_s, what_follows
from stagewire.launch.spec import Launch, StageSpec
from stagewire.observe.status_events import Phase, StatusEvent, StatusReceiver

__all__ = ["Screen", "Supervisor"]


class Screen(Protocol):
    """Where a person sees what happens."""

    def show(self, event: StatusEvent) -> None:
        """A stage has entered a phase, or is further in it."""

    def say(self, text: str) -> None:
        """Something else worth a line."""

    def finish(self) -> None:
        """No more bars: from here on plain text."""


@dataclass(frozen=True)
class _Exited:
    stage: LocalStage


@dataclass(frozen=True)
class _StartDue:
    spec: StageSpec
    num_failures: int


@dataclass(frozen=True)
class _StopAsked:
    pass


@dataclass(frozen=True)
class _Answered:
    found: Served | StagewireError


_Event = StatusEvent | _Exited | _StartDue | _StopAsked | _Answered


class Supervisor:
    """Runs a pipeline of local stages from start to stop.

    Args:
        launch: what is started.
        screen: told what happens.
        private_dir: short (AF_UNIX paths end at 107 bytes), private to the user; whoever made it removes it.
        serving: called once the ring has answered, with where and what; its text is shown.
        environ: what the stages get of the launcher's environment.
    """

    def __init__(
        self,
        launch: Launch,
        screen: Screen,
        private_dir: str,
        serving: Callable[[Api, Served], str],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._launch = launch
        self._screen = screen
        self._private_dir = private_dir
        self._serving = serving
        self._environ = environ
        self._api = launch.api
        self._timeouts = launch.timeouts
        self._stages: list[LocalStage] = []
        self._standbys: dict[int, LocalStage] = {}
        self._restarts: set[asyncio.Task[None]] = set()
        self._announcing: asyncio.Task[None] | None = None
        self._asked: int | None = None
        self._is_interrupted = False  # the head waits for a lost stage
        self._is_stopping = False

    def __repr__(self) -> str:
        phases = ", ".join(f"{stage.spec.index}: {stage.phase.value}" for stage in self._stages)
        return f"Supervisor({phases or 'nothing started'})"

    @property
    def api(self) -> Api:
        """The head's, as it has told it."""
        return self._api

    def progress(self) -> list[Progress]:
        """Of every stage that was started, in order."""
        return [stage.progress() for stage in self._stages]

    async def run(self) -> int:
        """Serves until asked to stop. Returns 0 when that happened while serving, 128 + signal before.

        Raises:
            StageFailed: a stage ended by itself.
            PeerError: the ring was not ready in time, or did not answer its first request.
        """
        self._queue: asyncio.Queue[_Event] = asyncio.Queue()
        self._receiver = StatusReceiver(f"{self._private_dir}/status.sock")
        loop = asyncio.get_running_loop()
        loop.add_reader(self._receiver.fileno(), self._receive)
        take_signals(self._on_signal)
        if os.getpid() == 1:
            loop.add_signal_handler(signal.SIGCHLD, reap_orphans)
        try:
            return await self._run()
        finally:
            await self._stop()
            loop.remove_reader(self._receiver.fileno())
            self._receiver.close()

    async def _run(self) -> int:
        served = await self._begin()
        if served is None:
            return 128 + (self._asked or 0)
        self._screen.finish()
        self._screen.say(self._serving(self._api, served))
        await self._serve()
        return 0

    async def _start(self, spec: StageSpec) -> LocalStage:
        stage = await start_stage(spec, self._launch, self._private_dir, self._environ)
        stage.exited = asyncio.create_task(self._watch(stage))
        return stage

    # ---- events ----------------------------------------------------------------------------------------------------

    async def _watch(self, stage: LocalStage) -> None:
        await stage.process.wait()
        self._receive()  # what it sent before it ended comes first
        self._queue.put_nowait(_Exited(stage))

    def _receive(self) -> None:
        for event in self._receiver.receive():
            if event.api is not None:
                self._api = Api.told(event.api)
                self._timeouts = replace(self._timeouts, drain=event.api.drain_s)
            elif 0 <= event.stage < len(self._launch.specs):
                self._queue.put_nowait(event)

    def _on_signal(self, signum: int) -> None:
        is_told_before = self._asked is not None or self._is_stopping
        if is_told_before and signum != signal.SIGHUP:  # a terminal's end comes with several of those
            self._kill_all()
        elif self._asked is None:
            self._asked = signum
            self._queue.put_nowait(_StopAsked())

    def _record(self, event: _Event) -> bool:
        """Records and shows what the event says; whether it is a stage's end."""
        if isinstance(event, StatusEvent):
            self._hear(self._stages[event.stage], event)
            return event.phase is Phase.FAILED
        return isinstance(event, _Exited)

    def _hear(self, stage: LocalStage, event: StatusEvent) -> None:
        for news in stage.take(event, _now()):
            self._screen.show(news)

    # ---- starting --------------------------------------------------------------------------------------------------

    async def _begin(self) -> Served | None:
        """From the first process to the first answer; None when asked to stop before that. Raises as `run`."""
        for spec in self._launch.specs:
            self._stages.append(await self._start(spec))
            self._screen.show(StatusEvent(spec.index, Phase.IMPORTING))
        try:
            async with asyncio.timeout(self._timeouts.start) as limit:
                watching = asyncio.create_task(self._watch_progress(limit))
                try:
                    return await self._until_answered()
                finally:
                    watching.cancel()
        except TimeoutError:
            raise PeerError(self._describe_timeout()) from None

    async def _watch_progress(self, limit: asyncio.Timeout) -> None:
        """Moves the deadline of the start, as long as the stages make progress."""
        while not limit.expired():
            for stage in self._stages:
                stage.pace.see_io(_now(), io_bytes(stage.process.pid))
            loading = [stage.pace for stage in self._stages if stage.is_before(Phase.LOADED)]
            paces = [stage.pace for stage in self._stages]
            limit.reschedule(deadline(loading, paces, self._timeouts.start))
            await asyncio.sleep(self._timeouts.look)

    async def _until_answered(self) -> Served | None:
        """What a first answer has shown; None when asked to stop before that."""
        asking: asyncio.Task[None] | None = None
        try:
            while True:
                event = await self._queue.get()
                if self._record(event):
                    raise await self._find_root_cause()
                if isinstance(event, _StopAsked):
                    return None
                if isinstance(event, _Answered):
                    if isinstance(event.found, StagewireError):
                        raise event.found
                    return event.found
                if asking is None and all(stage.phase is Phase.READY for stage in self._stages):
                    asking = asyncio.create_task(self._ask())
        finally:
            if asking is not None:
                asking.cancel()

    async def _ask(self) -> None:
        try:
            await self._until_ready()
            served = await asyncio.to_thread(self._api.first_request, self._timeouts.start)
            self._queue.put_nowait(_Answered(served))
        except StagewireError as error:
            self._queue.put_nowait(_Answered(error))

    async def _until_ready(self) -> None:
        while not await asyncio.to_thread(self._api.is_ready):
            await asyncio.sleep(self._timeouts.poll)

    async def _find_root_cause(self) -> StageFailed:
        """Waits a moment for others: the stage that lost its peer is often heard before the peer's own end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeouts.root_cause):
                while not is_cause_known(self._stages):
                    self._record(await self._queue.get())
        while not self._queue.empty():
            self._record(self._queue.get_nowait())
        worst = root_cause(self._stages)
        self._screen.show(StatusEvent(worst.spec.index, Phase.FAILED))
        return worst.failed(worst.describe_failure())

    def _describe_timeout(self) -> str:
        limit = f"{self._timeouts.start:g} s (--start-timeout)"
        late = [stage.describe_delay(_now()) for stage in self._stages if stage.phase is not Phase.READY]
        if not late:
            return f"{self._api.place}/ready and a first request: no answer within {limit}, though all stages are ready"
        return f"not ready within {limit}: {'; '.join(late)}; the time counts from the last progress"

    # ---- serving ---------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Until asked to stop.

        Raises:
            StageFailed: a stage has ended too often.
        """
        for stage in self._stages:
            stage.ready_at = _now()
            if self._launch.has_standbys and not stage.spec.is_head:
                self._plan_standby(stage.spec, 0)
        while True:
            match await self._queue.get():
                case _StopAsked():
                    return
                case _Exited(stage):
                    self._replace(stage)
                case _StartDue(spec, num_failures):
                    await self._start_again(spec, num_failures)
                case StatusEvent() as event:
                    self._hear_while_serving(event)

    def _hear_while_serving(self, event: StatusEvent) -> None:
        standby = self._standbys.get(event.stage)
        if standby is not None and standby.process.pid == event.pid:
            self._hear_standby(standby, event)
        else:
            self._hear_stage(self._stages[event.stage], event)

    def _hear_standby(self, standby: LocalStage, event: StatusEvent) -> None:
        """It is not drawn: the bars and lines of its stage are those of the process that serves."""
        match event.phase:
            case Phase.FAILED:
                standby.failure = standby.failure or event
            case Phase.LOADED if standby.ready_at is None:  # its later lines come in this phase too
                standby.ready_at = _now()
                self._screen.say(f"stage {event.stage}  a standby has loaded")
            case Phase.READY:  # it has the port before we know, or say, that its stage has ended
                standby.phase = event.phase

    def _hear_stage(self, stage: LocalStage, event: StatusEvent) -> None:
        self._hear(stage, event)
        match event.phase:
            case Phase.RECOVERING if self._is_interrupted:  # what the head says until the ring is whole again
                self._screen.say(event.text)
            case Phase.RECOVERING:
                self._is_interrupted = True
                self._screen.say(f"{event.text}: requests wait for it")
            case Phase.GIVEN_UP:
                self._screen.say(f"{event.text}: requests are refused until it does")
            case Phase.READY if self._is_interrupted and stage.spec.is_head:
                self._is_interrupted = False
                if self._announcing is None or self._announcing.done():  # the API of a new head may not be up yet
                    self._announcing = asyncio.create_task(self._say_when_serving())
        if event.phase is Phase.READY and stage.ready_at is None:
            stage.ready_at = _now()

    async def _say_when_serving(self) -> None:
        await self._until_ready()
        self._screen.say("serving again")

    def _replace(self, stage: LocalStage) -> None:
        """Does what follows from a process's end.

        Raises:
            StageFailed: its stage has failed too often in a row.
        """
        stage.kill()
        follows = self._decide(stage)
        text = stage.describe_failure()
        if follows in (Follows.STOP_ALL, Follows.GO_ON_WITHOUT) and self._launch.max_restarts:
            text += f"\n  it has ended {stage.num_failures} times in a row: not started again"
        match follows:
            case Follows.STOP_ALL:
                raise stage.failed(text)
            case Follows.GO_ON_WITHOUT:
                self._screen.say(f"{text}\nstage {stage.spec.index} goes on without a standby")
            case Follows.TAKE_OVER:
                self._screen.say(text)
                self._promote_standby(stage.spec, stage.num_failures)
            case Follows.START_AGAIN:
                pause = self._start_later(stage.spec, stage.num_failures)
                when = f" in {pause:g} s" if pause else ""
                self._screen.say(f"{text}\n{stage.name} is started again{when}")

    def _decide(self, stage: LocalStage) -> Follows:
        """Also counts the failure, and forgets a standby that has ended."""
        index = stage.spec.index
        is_standby = stage is self._standbys.get(index)
        if is_standby:
            del self._standbys[index]
        ready_s = None if stage.ready_at is None else _now() - stage.ready_at
        stage.num_failures = count_failures(stage.num_failures, ready_s, self._timeouts)
        has_standby, most = self._has_live_standby(index), self._launch.max_restarts
        return what_follows(stage.num_failures, most, is_standby=is_standby, has_standby=has_standby)

    def _has_live_standby(self, index: int) -> bool:
        standby = self._standbys.get(index)
        return standby is not None and not standby.has_failed

    def _promote_standby(self, spec: StageSpec, num_failures: int) -> None:
        """It takes the port by itself, also while it loads: a new process would be refused there."""
        standby = self._standbys.pop(spec.index)
        standby.spec, standby.num_failures = spec, num_failures
        if standby.ready_at is not None:  # it has served nothing before
            standby.ready_at = _now()
        self._stages[spec.index] = standby
        self._screen.say(f"stage {spec.index}: its standby takes over")
        if standby.phase is Phase.READY:
            self._screen.show(StatusEvent(spec.index, Phase.READY))
        if num_failures <= self._launch.max_restarts:
            self._plan_standby(spec, num_failures)

    def _plan_standby(self, spec: StageSpec, num_failures: int) -> None:
        self._start_later(replace(spec, stands_by=True), num_failures)

    def _start_later(self, spec: StageSpec, num_failures: int) -> float:
        """After a pause, whose length in seconds it returns."""
        pause = pause_s(num_failures, self._timeouts)

        async def wait() -> None:
            await asyncio.sleep(pause)
            self._queue.put_nowait(_StartDue(spec, num_failures))

        task = asyncio.create_task(wait())
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)
        return pause

    async def _start_again(self, spec: StageSpec, num_failures: int) -> None:
        if not spec.stands_by and self._has_live_standby(spec.index):  # that was started during the pause
            self._promote_standby(spec, num_failures)
            return
        stage = await self._start(spec)
        stage.num_failures = num_failures
        self._is_interrupted |= spec.is_head
        if spec.stands_by:
            self._standbys[spec.index] = stage
        else:
            self._stages[spec.index] = stage

    # ---- stopping --------------------------------------------------------------------------------------------------

    def _everybody(self) -> Iterator[LocalStage]:
        yield from self._stages
        yield from self._standbys.values()

    async def _stop(self) -> None:
        """The head of a ring that serves stops first: it answers open requests, and the workers end with the ring."""
        self._is_stopping = True
        for task in [*self._restarts, *filter(None, [self._announcing])]:
            task.cancel()
        self._screen.finish()
        if any(stage.is_running for stage in self._stages):
            self._screen.say("stopping")
        everybody = list(self._everybody())
        if self._stages and self._stages[0].phase is Phase.READY:
            await self._terminate(self._stages[:1], self._timeouts.head_stop + self._timeouts.drain)
            await self._terminate(everybody[1:], self._timeouts.stop)
        else:
            await self._terminate(everybody, self._timeouts.head_stop)
        self._kill_all()
        for stage in everybody:
            await stage.exited

    async def _terminate(self, stages: Sequence[LocalStage], timeout_s: float) -> None:
        for stage in stages:
            stage.terminate()
        if stages:
            await asyncio.wait([stage.exited for stage in stages], timeout=timeout_s)

    def _kill_all(self) -> None:
        for stage in self._everybody():
            stage.kill()


def _now() -> float:
    """The clock of the running loop, in seconds."""
    return asyncio.get_running_loop().time()
