"""Runs the demo's `stagewire up` in a terminal of its own, stops it once it serves, and draws what the terminal showed.

scripts/demo-picture starts it, with the demo's model in place.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "assets" / "demo.svg"
WORDS = ("up", "--model", ".demo/model", "--num-stages", "4", "--port", "8000")
# As scripts/demo: to compile takes longer than the first answers.
EXTRA = ("--", "--enforce-eager")
LAST_LINE = b"Ctrl-C stops everything."
COLUMNS, ROWS = 104, 60
TIMEOUT_S = 900.0
END_S = 30.0
# What moves a cursor or clears; colours stay in the text.
_CONTROL = re.compile(r"\x1b\[(\d*)([AKJ])|\x1b\[\?25[lh]|(\r\n|\r|\n)")


def record(command: Sequence[str], folder: Path) -> str:
    """Everything that the command writes to its terminal until it serves and after it was told to stop.

    Raises:
        TimeoutError: it does not serve, or does not end.
        RuntimeError: it ended by itself.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output, ends_at, is_told = b"", time.monotonic() + TIMEOUT_S, False
    try:
        while piece := _read(ours, ends_at):
            output += piece
            if LAST_LINE in output and not is_told:
                is_told, ends_at = True, time.monotonic() + END_S
                process.send_signal(signal.SIGINT)
        if not is_told:
            raise RuntimeError(f"{' '.join(command)} ended with code {process.wait(END_S)}: {output.decode()}")
    finally:
        process.terminate()
        process.wait(END_S)
        os.close(ours)
    return output.decode()


def _read(terminal: int, ends_at: float) -> bytes:
    """The next piece; empty when the other end is closed."""
    if not select.select([terminal], [], [], max(0.0, ends_at - time.monotonic()))[0]:
        raise TimeoutError("nothing came from the terminal any more")
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's word for the end of a terminal
        return b""


def screen_of(output: str) -> str:
    """The lines that are left on the screen, with their colours: a row is cleared before it is written again."""
    rows, row, begin = [""], 0, 0
    for control in _CONTROL.finditer(output):
        rows[row] += output[begin : control.start()]
        begin = control.end()
        count, action, ending = control.groups()
        if action == "A":
            row = max(0, row - int(count or 1))
        elif action == "K":
            rows[row] = ""
        elif ending in ("\n", "\r\n"):
            row += 1
            rows += [""] * (row + 1 - len(rows))
    rows[row] += output[begin:]
    return "\n".join(rows).strip("\n")


def draw(prompt: str, screen: str, title: str) -> str:
    """An SVG of a terminal. Its fonts are the reader's: rich's own would be fetched from another host."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115  ends with the console
    console.print(Text(f"$ {prompt}", style="bold"))
    console.print(Text.from_ansi(screen), overflow="fold")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "monospace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE, help="default: docs/assets/demo.svg")
    target = parser.parse_args().output
    screen = screen_of(record([str(ROOT / ".venv" / "bin" / "stagewire"), *WORDS, *EXTRA], ROOT))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(draw(f"stagewire {' '.join((*WORDS, *EXTRA))}", screen, "scripts/demo"))
    print(f"{target}: {len(screen.splitlines())} lines")


if __name__ == "__main__":
    main()
