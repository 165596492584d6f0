"""One started stage: its process, how far it is, and why it ended.

Starts and ends the process of a stage and records what the stage says. Does not decide what follows from an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from stagewire.errors import ConfigError, PeerError, StagewireError
from stagewire.launch.hints import hint, last_error
from stagewire.launch.pace import Pace
from stagewire.launch.spec import Launch, StageSpec, stage_environment
from stagewire.observe.processes import describe_exit, die_with
from stagewire.observe.status_events import Phase, StatusEvent

__all__ = ["LocalStage", "Progress", "StageFailed", "is_cause_known", "root_cause", "start_stage"]

_LOG_TAIL_BYTES = 64 << 10
# The head says these besides. A healthy stage passes the other phases in their order.
_NO_STEPS = (Phase.RECOVERING, Phase.GIVEN_UP)
_ORDER = [phase for phase in Phase if phase not in _NO_STEPS]
# Whoever sends one of these leaves the stage no time to say why: the end of its log would mislead.
_SILENT_ENDS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGILL)


class StageFailed(StagewireError):
    """A stage ended, or said that it will; ``exit_code`` is that stage's own, 1 when it was killed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Progress:
    """How far a stage is. ``failure`` says why it ended or will, empty while it has not."""

    spec: StageSpec
    phase: Phase
    text: str
    pid: int
    failure: str


@dataclass(eq=False)
class LocalStage:
    """A started stage and what is known of it. Times are seconds of the running loop's clock.

    Args:
        exited: done once the process has ended; set by whoever watches it.
        early_link: told while the stage was still loading.
        failure: what the stage itself says of its end.
        num_failures: in a row, of this stage's processes before this one.
        ready_at: since when it could serve; None while it could not.
    """

    spec: StageSpec
    process: asyncio.subprocess.Process
    log: Path
    pace: Pace
    exited: asyncio.Task[None] = field(init=False)
    phase: Phase = Phase.IMPORTING
    text: str = ""
    early_link: StatusEvent | None = None
    failure: StatusEvent | None = None
    num_failures: int = 0
    ready_at: float | None = None

    @property
    def name(self) -> str:
        return f"a standby of stage {self.spec.index}" if self.spec.stands_by else f"stage {self.spec.index}"

    @property
    def is_running(self) -> bool:
        return self.process.returncode is None

    @property
    def has_failed(self) -> bool:
        return self.failure is not None or not self.is_running

    @property
    def exit_code(self) -> int:
        """What the stage says of itself is nearer to the cause than what its process returns."""
        if self.failure is not None and self.failure.exit_code:
            return self.failure.exit_code
        return 1 if self.process.returncode is None else self.process.returncode

    def is_before(self, phase: Phase) -> bool:
        return _ORDER.index(self.phase) < _ORDER.index(phase)

    # ---- what it says ----------------------------------------------------------------------------------------------

    def take(self, event: StatusEvent, now: float) -> list[StatusEvent]:
        """Records what the stage says. Returns the events that are progress, for people to see.

        Each of the head's processes reports for itself, and links may be made again: an event that is no progress is
        dropped. The ring may be linked while this stage still loads. The link is then shown after the loading.
        """
        if event.phase in (Phase.STOPPED, *_NO_STEPS):
            return []
        if event.phase is Phase.FAILED:
            self.failure = self.failure or event
            return []
        if event.phase is Phase.LINKED and self.is_before(Phase.LOADED):
            self.early_link = event
            return []
        if not self.is_before(event.phase) and not (event.share and event.phase is self.phase):
            return []
        news = [event]
        if event.phase is Phase.LOADED and self.early_link is not None:
            news.append(self.early_link)
        for each in news:
            self._advance(each, now)
        return news

    def _advance(self, event: StatusEvent, now: float) -> None:
        if self.is_before(event.phase):
            self.pace.step(now)
        if event.total_bytes:
            self.pace.read(now, event.done_bytes, event.total_bytes)
        self.phase, self.text = event.phase, event.text

    def progress(self) -> Progress:
        failure = ""
        if self.has_failed:
            returncode = self.process.returncode
            how = "" if returncode is None else describe_exit(returncode)
            failure = self.failure.text if self.failure else f"stage {self.spec.index} {how}"
        return Progress(self.spec, self.phase, self.text, self.process.pid, failure)

    def describe_delay(self, now: float) -> str:
        return f"stage {self.spec.index} is at {self.phase.value!r}, {self.pace.describe(now)} (log: {self.log})"

    # ---- its end ---------------------------------------------------------------------------------------------------

    def blame(self) -> int:
        """0 for the likeliest root cause. Exit code 3 is "lost a peer": it follows from another stage's end."""
        if self.exit_code < 0 or self.exit_code == ConfigError.exit_code:
            return 0
        return {1: 1, 0: 2, PeerError.exit_code: 3}.get(self.exit_code, 1)

    def describe_failure(self) -> str:
        """The stage's own reason, its log, and what to try next where that is known."""
        tail = _read_tail(self.log)
        returncode = self.process.returncode
        how = "failed" if returncode is None else describe_exit(returncode)
        reason = self.failure.text if self.failure else ""
        if not reason and returncode not in _SILENT_ENDS:
            reason = last_error(tail)
        advice = hint(self.exit_code, f"{reason}\n{tail}")
        parts = [f"{self.name} {how}: {reason}" if reason else f"{self.name} {how}"]
        parts += [f"  hint: {advice}"] if advice else []
        return "\n".join([*parts, f"  its log: {self.log}"])

    def failed(self, text: str) -> StageFailed:
        """What the launcher ends with because of this stage."""
        return StageFailed(text, self.exit_code if self.exit_code > 0 else 1)

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def kill(self) -> None:
        """With all its processes: a head's EngineCore outlives an API server that was killed."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def is_cause_known(stages: Sequence[LocalStage]) -> bool:
    """Whether no other stage's end can be nearer to the cause than those that are known."""
    failed = [stage for stage in stages if stage.has_failed]
    # A stage that said why and still runs may end meanwhile, and its end is then told as it was.
    return len(failed) == len(stages) or any(stage.blame() == 0 for stage in failed)


def root_cause(stages: Sequence[LocalStage]) -> LocalStage:
    """Of stages of which at least one has failed: the one that most likely took the others with it."""
    return min((stage for stage in stages if stage.has_failed), key=LocalStage.blame)


def _read_tail(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        return log.read().decode(errors="replace")
    return ""


async def start_stage(
    spec: StageSpec, launch: Launch, private_dir: str, environ: Mapping[str, str] = os.environ
) -> LocalStage:
    """Starts the process of ``spec``, or of its standby; the caller sets ``exited``.

    Args:
        private_dir: short (AF_UNIX paths end at 107 bytes), private to the user; whoever made it removes it.
    """
    name = f"stage_{spec.index}{'_standby' if spec.stands_by else ''}.log"
    resources = launch.resources[spec.index]
    with launch.logs.open_log(name) as out:
        process = await asyncio.create_subprocess_exec(
            *launch.command(spec),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=asyncio.subprocess.STDOUT,
            env=stage_environment(resources, private_dir, environ),
            # A terminal's Ctrl-C reaches the launcher alone, which stops the stages in order.
            start_new_session=True,
            preexec_fn=partial(_begin_stage, os.getpid(), resources.cores),
        )
    return LocalStage(spec, process, launch.logs.path / name, Pace(asyncio.get_running_loop().time()))


def _begin_stage(launcher: int, cores: Collection[int]) -> None:
    """In the child, before it becomes the stage."""
    if cores:
        os.sched_setaffinity(0, cores)
    die_with(launcher)
