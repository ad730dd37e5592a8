"""SIGTERM and Ctrl-C: a run that can save does so and stops at a step's end; anything else stops at once. Imports no torch.

And how long processes wait for each other.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

PATIENCE = timedelta(hours=12)  # while one saves a large model, the others wait: ten minutes, NCCL's own, are too short
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal asked the process to stop. Like KeyboardInterrupt no `Exception`: it ends a whole sweep."""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}{where}")
        self.code = 128 + signum  # as a shell says it


def stop_at_once() -> None:
    """From here on a signal raises `Stopped`."""
    _handle(_stop)


class SoftStop:
    """While entered, a signal is only remembered in `signum`; Ctrl-C a second time stops at once.

    A second SIGTERM does not: torchrun sends one after the Ctrl-C that its processes have had already.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> SoftStop:
        self._before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        _handle(self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            if threading.current_thread() is threading.main_thread():
                signal.signal(signum, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if signum == self.signum == signal.SIGINT:
            raise Stopped(signum)
        self.signum = self.signum or signum


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    """Only what the caller's shell does not have the process ignore (`nohup`, `&`), and only in the main thread."""
    for signum in SIGNALS:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)
