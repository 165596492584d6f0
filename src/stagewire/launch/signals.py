"""Which signals ask a launcher to stop."""

from __future__ import annotations

import signal

__all__ = ["stop_signals"]


def stop_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM and the end of the terminal; asked before any of them is handled.

    A SIGHUP that was ignored when this process was started (nohup) stays ignored, here and in the stages.
    """
    is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_deaf else [signal.SIGHUP])]
