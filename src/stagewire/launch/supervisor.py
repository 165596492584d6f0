"""Starts local stages, watches them, starts them again, stops them in order. One loop over one queue of events.

Owns processes, signals and deadlines. What the stages are started with, and what is drawn, is decided elsewhere.

    status message ──┐
    child's exit   ──┼──> queue ──> run(): starting ──> first request ──> serving ──> stop: head, then the rest
    signal         ──┤                 └─ a stage failed, or a deadline passed ──────────^
    first answer   ──┤                                                       │
    back-off over  ──┘                 a stage ended: it is started again, after a pause that grows, unless it has
                                       ended too often without having been ready for long

Before the first answer a stage that ends stops everything: what is wrong then would be wrong again. After it, if asked
to, a second process of each stage but the head is started that stands by; it takes the place of the first when that
ends, and a new one stands by for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from stagewire.errors import ConfigError, PeerError, StagewireError
from stagewire.launch.api import Api, Served
from stagewire.launch.hints import describe_exit, hint, last_error
from stagewire.launch.logs import LogFolder
from stagewire.launch.loop import take_signals
from stagewire.launch.orphans import reap_orphans
from stagewire.launch.pace import Pace, deadline, io_bytes
from stagewire.launch.screen import Screen
from stagewire.launch.spec import CommandBuilder, Resources, StageSpec, stage_environment
from stagewire.observe.processes import die_with
from stagewire.observe.status_events import Phase, StatusEvent, StatusReceiver

__all__ = ["DEFAULT_MAX_RESTARTS", "Progress", "StageFailed", "Supervisor", "Timeouts"]

DEFAULT_MAX_RESTARTS = 6
_LOG_TAIL_BYTES = 64 << 10
# What is said besides is no step on the way.
_ORDER: list[Phase] = [phase for phase in Phase if phase not in (Phase.RECOVERING, Phase.GIVEN_UP)]


class StageFailed(StagewireError):
    """A stage ended, or said that it will; ``exit_code`` is that stage's own, 1 when it was killed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Timeouts:
    """Seconds. ``start``: since a stage last got on (launch/pace.py); ``look``: between looks at that.
    ``root_cause``: for stages that failed before the one heard first to say so. ``poll``: between
    questions to the head's HTTP port, the one thing that sends no message when it changes. ``back_off``: before a stage
    is started for the third time; the first time again at once, later ones after twice as long each, at most
    ``most_back_off``. ``healthy``: a stage that was ready for so long has not failed because of how it was started."""

    start: float = 600.0
    look: float = 1.0
    root_cause: float = 1.0
    head_stop: float = 2.0
    drain: float = 0.0  # more for a head that may have open requests
    stop: float = 0.7
    poll: float = 0.2
    back_off: float = 1.0
    most_back_off: float = 30.0
    healthy: float = 60.0


@dataclass(frozen=True)
class Progress:
    """How far a stage is. ``failure`` says why it ended or will, empty while it has not."""

    spec: StageSpec
    phase: Phase
    text: str
    pid: int
    failure: str


@dataclass(frozen=True)
class _Exited:
    stage: _Stage


@dataclass(frozen=True)
class _StartDue:
    spec: StageSpec
    num_failures: int


@dataclass(frozen=True)
class _StopAsked:
    signum: int


@dataclass(frozen=True)
class _Answered:
    found: Served | StagewireError


_Event = StatusEvent | _Exited | _StartDue | _StopAsked | _Answered


@dataclass(eq=False)
class _Stage:
    """A started stage and what is known of it."""

    spec: StageSpec
    process: asyncio.subprocess.Process
    log: Path
    pace: Pace
    phase: Phase = Phase.IMPORTING
    text: str = ""
    early_link: StatusEvent | None = None
    failure: StatusEvent | None = None
    num_failures: int = 0  # in a row, of this stage's processes before this one
    ready_at: float | None = None
    exited: asyncio.Task[None] = field(init=False)

    @property
    def name(self) -> str:
        return f"a standby of stage {self.spec.index}" if self.spec.stands_by else f"stage {self.spec.index}"

    @property
    def has_failed(self) -> bool:
        return self.failure is not None or self.process.returncode is not None

    @property
    def exit_code(self) -> int:
        """What it says of itself is nearer to the cause than what its process returns."""
        if self.failure is not None and self.failure.exit_code:
            return self.failure.exit_code
        return 1 if self.process.returncode is None else self.process.returncode

    def is_before(self, phase: Phase) -> bool:
        return _ORDER.index(self.phase) < _ORDER.index(phase)

    def blame(self) -> int:
        """0 for the likeliest root cause. Exit code 3 is "lost a peer": it follows from somebody else's end."""
        if self.exit_code < 0 or self.exit_code == ConfigError.exit_code:
            return 0
        return {1: 1, 0: 2, PeerError.exit_code: 3}.get(self.exit_code, 1)

    def progress(self) -> Progress:
        failure = ""
        if self.has_failed:
            how = "" if self.process.returncode is None else describe_exit(self.process.returncode)
            failure = self.failure.text if self.failure else f"stage {self.spec.index} {how}"
        return Progress(self.spec, self.phase, self.text, self.process.pid, failure)

    def describe_failure(self) -> str:
        """The stage's own reason, its log, and what to try next where that is known."""
        tail = _read_tail(self.log)
        returncode = self.process.returncode
        how = "failed" if returncode is None else describe_exit(returncode)
        reason = self.failure.text if self.failure else ""
        # Whoever is killed from outside had no time for last words: the end of its log would mislead.
        if not reason and returncode not in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGILL):
            reason = last_error(tail)
        advice = hint(self.exit_code, f"{reason}\n{tail}")
        parts = [f"{self.name} {how}: {reason}" if reason else f"{self.name} {how}"]
        parts += [f"  hint: {advice}"] if advice else []
        return "\n".join([*parts, f"  its log: {self.log}"])


def _begin_stage(launcher: int, cores: Collection[int]) -> None:
    """In the child, before it becomes the stage."""
    if cores:
        os.sched_setaffinity(0, cores)
    die_with(launcher)


def _read_tail(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        return log.read().decode(errors="replace")
    return ""


class Supervisor:
    """Runs a pipeline of local stages from start to stop.

    Args:
        specs: in the order of their index.
        command: builds a stage's command line.
        resources: environment and cores for each stage.
        api: the head's, as far as it is known before the head tells.
        private_dir: short (AF_UNIX paths end at 107 bytes), private to the user; whoever made it removes it.
        logs: stage_<i>.log are written there.
        serving: called once the ring has answered, with where and what; its text is shown.
        max_restarts: how often in a row a stage is started again, or taken over by its standby, while serving.
        has_standbys: whether a second process of each stage but the head stands by; it takes over once also if
            ``max_restarts`` is 0.
    """

    def __init__(
        self,
        specs: Sequence[StageSpec],
        command: CommandBuilder,
        resources: Sequence[Resources],
        api: Api,
        screen: Screen,
        private_dir: str,
        logs: LogFolder,
        serving: Callable[[Api, Served], str],
        timeouts: Timeouts | None = None,
        environ: Mapping[str, str] = os.environ,
        max_restarts: int = DEFAULT_MAX_RESTARTS,
        has_standbys: bool = False,
    ) -> None:
        self._has_standbys = has_standbys
        self._standbys: dict[int, _Stage] = {}
        self._max_restarts = max_restarts
        self._restarts: set[asyncio.Task[None]] = set()
        self._specs = specs
        self._command = command
        self._resources = resources
        self._api = api
        self._screen = screen
        self._private_dir = private_dir
        self._logs = logs
        self._serving = serving
        self._timeouts = timeouts or Timeouts()
        self._environ = environ
        self._stages: list[_Stage] = []
        self._asked: int | None = None
        self._is_interrupted = False  # a lost stage is waited for
        self._announcing: asyncio.Task[None] | None = None
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
        for spec, resources in zip(self._specs, self._resources, strict=True):
            self._stages.append(await self._start(spec, resources))
            self._screen.show(StatusEvent(spec.index, Phase.IMPORTING))
        try:
            async with asyncio.timeout(self._timeouts.start) as limit:
                watching = asyncio.create_task(self._watch_progress(limit))
                try:
                    served = await self._until_answered()
                finally:
                    watching.cancel()
        except TimeoutError:
            raise PeerError(self._describe_timeout()) from None
        if served is None:
            return 128 + (self._asked or 0)
        self._screen.finish()
        self._screen.say(self._serving(self._api, served))
        await self._serve()
        return 0

    async def _start(self, spec: StageSpec, resources: Resources) -> _Stage:
        name = f"stage_{spec.index}{'_standby' if spec.stands_by else ''}.log"
        cores = resources.cores
        with self._logs.open_log(name) as out:
            process = await asyncio.create_subprocess_exec(
                *self._command(spec),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=asyncio.subprocess.STDOUT,
                env=stage_environment(resources, self._private_dir, self._environ),
                # A terminal's Ctrl-C reaches the launcher alone, which stops the stages in order.
                start_new_session=True,
                preexec_fn=partial(_begin_stage, os.getpid(), cores),
            )
        stage = _Stage(spec, process, self._logs.path / name, Pace(asyncio.get_running_loop().time()))
        stage.exited = asyncio.create_task(self._watch(stage))
        return stage

    # ---- serving ---------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Until asked to stop.

        Raises:
            StageFailed: a stage has ended too often.
        """
        now = asyncio.get_running_loop().time
        for stage in self._stages:
            stage.ready_at = now()
            if self._has_standbys and not stage.spec.is_head:
                self._plan_standby(stage.spec, 0)
        while True:
            event = await self._queue.get()
            match event:
                case _StopAsked():
                    return
                case _Exited(stage):
                    self._replace(stage)
                case _StartDue(spec, num_failures) if not spec.stands_by and self._has_live_standby(spec.index):
                    self._promote_standby(spec, num_failures)  # it was started meanwhile
                case _StartDue(spec, num_failures):
                    stage = await self._start(spec, self._resources[spec.index])
                    stage.num_failures = num_failures
                    self._is_interrupted |= spec.is_head
                    if spec.stands_by:
                        self._standbys[spec.index] = stage
                    else:
                        self._stages[spec.index] = stage
                case StatusEvent():
                    self._note_while_serving(event)

    def _note_while_serving(self, event: StatusEvent) -> None:
        standby = self._standbys.get(event.stage)
        if standby is not None and standby.process.pid == event.pid:
            match event.phase:
                case Phase.FAILED:
                    standby.failure = standby.failure or event
                case Phase.LOADED:
                    standby.ready_at = asyncio.get_running_loop().time()
                    self._screen.say(f"stage {event.stage}  a standby has loaded")
                case Phase.READY:  # it has the port before we know, or say, that its stage has ended
                    standby.phase = event.phase
            return
        stage = self._stages[event.stage]
        match event.phase:
            case Phase.RECOVERING:
                self._is_interrupted = True
                self._screen.say(f"{event.text}: requests wait for it")
            case Phase.GIVEN_UP:
                self._screen.say(f"{event.text}: requests are refused until it does")
            case Phase.READY if self._is_interrupted and stage.spec.is_head:
                if stage.is_before(Phase.READY):  # a new one, whose API is not up yet
                    self._note(event)
                self._is_interrupted = False
                if self._announcing is None or self._announcing.done():
                    self._announcing = asyncio.create_task(self._say_when_serving())
            case Phase.FAILED:
                stage.failure = stage.failure or event
            case _:
                self._note(event)
        if event.phase is Phase.READY and stage.ready_at is None:
            stage.ready_at = asyncio.get_running_loop().time()

    def _replace(self, stage: _Stage) -> None:
        """By its standby, which may still load, or by a new process.

        Raises:
            StageFailed: it has failed too often in a row.
        """
        index = stage.spec.index
        with contextlib.suppress(ProcessLookupError, PermissionError):  # a head's EngineCore outlives it
            os.killpg(stage.process.pid, signal.SIGKILL)
        is_standby = stage is self._standbys.get(index)
        if is_standby:
            del self._standbys[index]
        has_standby = self._has_live_standby(index)
        self._count_failure(stage)
        text = stage.describe_failure()
        # With --restarts 0 nothing is started again; a standby that was asked for is there to be used.
        num_allowed = max(self._max_restarts, 1) if has_standby else self._max_restarts
        if stage.num_failures > num_allowed:
            if self._max_restarts:
                text += f"\n  it has ended {stage.num_failures} times in a row: not started again"
            if not is_standby:
                raise StageFailed(text, stage.exit_code if stage.exit_code > 0 else 1)
            self._screen.say(f"{text}\nstage {index} goes on without a standby")
        elif has_standby:
            self._screen.say(text)
            self._promote_standby(stage.spec, stage.num_failures)
        else:
            pause = self._start_later(stage.spec, stage.num_failures)
            when = f" in {pause:g} s" if pause else ""
            self._screen.say(f"{text}\n{stage.name} is started again{when}")

    def _count_failure(self, stage: _Stage) -> None:
        """The first in a row, if it was healthy before."""
        now = asyncio.get_running_loop().time()
        if stage.ready_at is not None and now - stage.ready_at >= self._timeouts.healthy:
            stage.num_failures = 0
        stage.num_failures += 1

    def _has_live_standby(self, index: int) -> bool:
        standby = self._standbys.get(index)
        return standby is not None and not standby.has_failed

    def _promote_standby(self, spec: StageSpec, num_failures: int) -> None:
        """It takes the port by itself, also while it loads: a new process would be refused there."""
        standby = self._standbys.pop(spec.index)
        standby.spec, standby.num_failures = spec, num_failures
        if standby.ready_at is not None:  # it has served nothing before
            standby.ready_at = asyncio.get_running_loop().time()
        self._stages[spec.index] = standby
        self._screen.say(f"stage {spec.index}: its standby takes over")
        if standby.phase is Phase.READY:
            self._screen.show(StatusEvent(spec.index, Phase.READY))
        if num_failures <= self._max_restarts:
            self._plan_standby(spec, num_failures)

    def _plan_standby(self, spec: StageSpec, num_failures: int) -> None:
        self._start_later(replace(spec, stands_by=True), num_failures)

    def _start_later(self, spec: StageSpec, num_failures: int) -> float:
        """After a pause that grows with the failures; its length in seconds."""
        pause = 0.0
        if num_failures > 1:
            pause = min(self._timeouts.back_off * 2 ** (num_failures - 2), self._timeouts.most_back_off)

        async def wait() -> None:
            await asyncio.sleep(pause)
            self._queue.put_nowait(_StartDue(spec, num_failures))

        task = asyncio.create_task(wait())
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)
        return pause

    # ---- events ----------------------------------------------------------------------------------------------------

    async def _watch(self, stage: _Stage) -> None:
        await stage.process.wait()
        self._receive()  # its last words were sent before it ended
        self._queue.put_nowait(_Exited(stage))

    def _receive(self) -> None:
        for event in self._receiver.receive():
            if event.api is not None:
                self._api = Api.told(event.api)
                self._timeouts = replace(self._timeouts, drain=event.api.drain_s)
            elif 0 <= event.stage < len(self._specs):
                self._queue.put_nowait(event)

    def _on_signal(self, signum: int) -> None:
        is_told_before = self._asked is not None or self._is_stopping
        if is_told_before and signum != signal.SIGHUP:  # a terminal's end comes with several of those
            self._kill_groups()
        elif self._asked is None:
            self._asked = signum
            self._queue.put_nowait(_StopAsked(signum))

    # ---- waiting ---------------------------------------------------------------------------------------------------

    async def _watch_progress(self, limit: asyncio.Timeout) -> None:
        """Moves the end of the start on, as long as the stages get on."""
        loop = asyncio.get_running_loop()
        while not limit.expired():
            for stage in self._stages:
                stage.pace.see_io(loop.time(), io_bytes(stage.process.pid))
            loading = [stage.pace for stage in self._stages if stage.is_before(Phase.LOADED)]
            paces = [stage.pace for stage in self._stages]
            limit.reschedule(deadline(loading, paces, self._timeouts.start))
            await asyncio.sleep(self._timeouts.look)

    async def _until_answered(self) -> Served | None:
        """What a first answer has shown; None when asked to stop before that."""
        asking: asyncio.Task[None] | None = None
        try:
            while True:
                event = await self._next()
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
            while not await asyncio.to_thread(self._api.is_ready):
                await asyncio.sleep(self._timeouts.poll)
            served = await asyncio.to_thread(self._api.first_request, self._timeouts.start)
            self._queue.put_nowait(_Answered(served))
        except StagewireError as error:
            self._queue.put_nowait(_Answered(error))

    async def _say_when_serving(self) -> None:
        while not await asyncio.to_thread(self._api.is_ready):
            await asyncio.sleep(self._timeouts.poll)
        self._screen.say("serving again")

    async def _next(self) -> _Event:
        """The next event that is not a stage's failure.

        Raises:
            StageFailed: with the root cause.
        """
        event = await self._queue.get()
        if self._note(event):
            raise await self._find_root_cause()
        return event

    def _note(self, event: _Event) -> bool:
        """Records and shows what the event says; whether it is a stage's end."""
        if isinstance(event, _Exited):
            return True
        if not isinstance(event, StatusEvent) or event.phase in (Phase.STOPPED, Phase.RECOVERING, Phase.GIVEN_UP):
            return False
        stage = self._stages[event.stage] if event.stage < len(self._stages) else None
        if stage is None:
            return False
        if event.phase is Phase.FAILED:
            stage.failure = stage.failure or event
            return True
        if event.phase is Phase.LINKED and stage.is_before(Phase.LOADED):
            stage.early_link = event  # the ring links while stages load; what takes longer is shown
            return False
        # The head's processes report each for itself, and linking repeats: only progress is shown.
        if stage.is_before(event.phase) or (event.share and event.phase is stage.phase):
            self._advance(stage, event)
            if event.phase is Phase.LOADED and stage.early_link is not None:
                self._advance(stage, stage.early_link)
        return False

    def _advance(self, stage: _Stage, event: StatusEvent) -> None:
        now = asyncio.get_running_loop().time()
        if stage.is_before(event.phase):
            stage.pace.step(now)
        if event.total_bytes:
            stage.pace.read(now, event.done_bytes, event.total_bytes)
        stage.phase, stage.text = event.phase, event.text
        self._screen.show(event)

    async def _find_root_cause(self) -> StageFailed:
        """Waits a moment for others: the stage that lost its peer is often heard before the peer's own end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeouts.root_cause):
                while not self._is_cause_known():
                    self._note(await self._queue.get())
        while not self._queue.empty():
            self._note(self._queue.get_nowait())
        failed = [stage for stage in self._stages if stage.has_failed]
        worst = min(failed, key=_Stage.blame)
        self._screen.show(StatusEvent(worst.spec.index, Phase.FAILED))
        return StageFailed(worst.describe_failure(), worst.exit_code if worst.exit_code > 0 else 1)

    def _is_cause_known(self) -> bool:
        failed = [stage for stage in self._stages if stage.has_failed]
        # A process that said why and has not ended yet gets the moment too, so that its end is told as it was.
        return len(failed) == len(self._stages) or any(stage.blame() == 0 for stage in failed)

    def _describe_timeout(self) -> str:
        limit, now = f"{self._timeouts.start:g} s (--start-timeout)", asyncio.get_running_loop().time()
        late = [stage for stage in self._stages if stage.phase is not Phase.READY]
        if not late:
            return f"{self._api.place}/ready and a first request: no answer within {limit}, though all stages are ready"
        where = "; ".join(
            f"stage {stage.spec.index} is at {stage.phase.value!r}, {stage.pace.describe(now)} (log: {stage.log})"
            for stage in late
        )
        return f"not ready within {limit}: {where}; the time counts from the last progress"

    # ---- stopping --------------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """Of a ring that serves the head first: it answers what it may, and the workers end with the ring."""
        self._is_stopping = True
        for task in [*self._restarts, *filter(None, [self._announcing])]:
            task.cancel()
        self._screen.finish()
        running = [stage for stage in self._stages if stage.process.returncode is None]
        if running:
            self._screen.say("stopping")
        everybody = [*self._stages, *self._standbys.values()]
        if self._stages and self._stages[0].phase is Phase.READY:
            await self._terminate(self._stages[:1], self._timeouts.head_stop + self._timeouts.drain)
            await self._terminate(everybody[1:], self._timeouts.stop)
        else:
            await self._terminate(everybody, self._timeouts.head_stop)
        self._kill_groups()
        for stage in (*self._stages, *self._standbys.values()):
            await stage.exited

    async def _terminate(self, stages: Sequence[_Stage], timeout_s: float) -> None:
        for stage in stages:
            with contextlib.suppress(ProcessLookupError):
                stage.process.terminate()
        if stages:
            await asyncio.wait([stage.exited for stage in stages], timeout=timeout_s)

    def _kill_groups(self) -> None:
        """Ends what is left: of the head also its EngineCore process, which outlives an API server that was killed."""
        for stage in (*self._stages, *self._standbys.values()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(stage.process.pid, signal.SIGKILL)
