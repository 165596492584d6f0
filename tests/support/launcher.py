"""A launcher as a person starts it, and the stages that it started."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from support.stages import child_environment


class Up:
    """A running launcher and what it has printed."""

    def __init__(self, command: Sequence[str], folder: Path, env: dict[str, str]) -> None:
        environment = child_environment(env)
        environment.pop("OMP_NUM_THREADS")  # the launcher divides the cores itself
        self.popen = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.text = ""
        self._selector = selectors.DefaultSelector()
        assert self.popen.stdout is not None
        self._output = self.popen.stdout
        self._selector.register(self._output, selectors.EVENT_READ)

    def read_until(self, text: str, deadline_s: float) -> None:
        """Until the launcher has printed ``text``; its whole output when it ends before."""
        ends_at = time.monotonic() + deadline_s
        while text not in self.text:
            assert self._selector.select(max(0.0, ends_at - time.monotonic())), f"{text!r} not in:\n{self.text}"
            chunk = os.read(self._output.fileno(), 65536)
            assert chunk, f"the launcher ended without {text!r}:\n{self.text}"
            self.text += chunk.decode()

    def wait(self) -> int:
        code = self.popen.wait(60)
        self.text += self._output.read().decode()
        return code


def stages_of(model: Path) -> dict[int, list[str]]:
    """Command lines, by pid, of the processes that serve this model."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(model) in words and "serve" in words:
            found[int(folder.name)] = words
    return found
