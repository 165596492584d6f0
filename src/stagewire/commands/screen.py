"""What a person sees while a pipeline starts: live bars on a terminal, one line for each event elsewhere.

Does not know that the terminal may be gone: the stream takes care of that (observe/streams.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from stagewire.launch.spec import StageSpec
from stagewire.launch.supervisor import Screen
from stagewire.observe.status_events import Phase, StatusEvent

__all__ = ["LiveScreen", "PlainScreen", "open_screen"]

_LABELS = {Phase.KV_CACHE: "KV cache"}
# On the way to READY.
_STEPS = list(Phase)[: list(Phase).index(Phase.READY) + 1]


def describe(event: StatusEvent) -> str:
    """``loading layers 14-21 (0.11 GB)``."""
    return f"{_LABELS.get(event.phase, event.phase.value)} {event.text}".rstrip()


class PlainScreen:
    """A line for each event, and one for each quarter of a phase that tells its share."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown: dict[int, tuple[Phase, int]] = {}  # by stage: phase and quarter

    def show(self, event: StatusEvent) -> None:
        shown = (event.phase, int(event.share * 4))
        if event.share and self._shown.get(event.stage, (event.phase, 0)) == shown:
            return
        self._shown[event.stage] = shown
        self.say(f"stage {event.stage}  {describe(event)}")

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def finish(self) -> None:
        pass


class LiveScreen(PlainScreen):
    """One row with a bar for each stage until the ring serves; then as `PlainScreen`."""

    def __init__(self, out: TextIO, specs: Sequence[StageSpec]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__(out)
        columns = ("{task.fields[stage]}", "[dim]layers {task.fields[layers]}")
        self._progress: Progress | None = Progress(
            *map(TextColumn, columns),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(file=out),
        )
        self._tasks = [
            self._progress.add_task("starting", total=len(_STEPS) - 1, stage=_name(spec), layers=str(spec.layers))
            for spec in specs
        ]
        self._progress.start()

    def show(self, event: StatusEvent) -> None:
        from rich.markup import escape

        if self._progress is None:
            super().show(event)
        elif event.phase in _STEPS:
            self._progress.update(
                self._tasks[event.stage],
                description=escape(describe(event)),
                completed=_STEPS.index(event.phase) + event.share,
            )
        else:
            self._progress.update(self._tasks[event.stage], description=f"[red]{event.phase.value}")

    def say(self, text: str) -> None:
        if self._progress is None:
            super().say(text)
        else:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()


def _name(spec: StageSpec) -> str:
    return f"stage {spec.index}{' (head)' if spec.is_head else ''}"


def open_screen(specs: Sequence[StageSpec]) -> Screen:
    return LiveScreen(sys.stdout, specs) if sys.stdout.isatty() else PlainScreen(sys.stdout)
