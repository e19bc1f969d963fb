"""SIGTERM and SIGHUP end a job as Ctrl-C does, with the exit status that a shell gives the signal.

SIGTERM comes from `kill`, schedulers and preempted machines, SIGHUP from a closed terminal. The handler
raises KeyboardInterrupt because Ray's C++ core handles it; a SystemExit during a wait makes it abort.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
STATUSES = {128 + number for number in SIGNALS}
_RAY_START_STATUS = int(signal.SIGTERM)  # of Ray's own handler, until Ray is connected


class ReceivedSignal:
    """The signal that asked this process to end, if any."""

    number: int | None = None

    @property
    def status(self) -> int | None:
        """The signal's exit status; None if there was no signal."""
        return None if self.number is None else 128 + self.number


@contextmanager
def interrupt_on_signals(raises: Callable[[], bool] = lambda: True) -> Iterator[ReceivedSignal]:
    """Make SIGNALS raise KeyboardInterrupt in the main thread, once; later signals are ignored.

    If `raises` returns False, nothing is raised: another error is already ending the job. A signal that
    is already ignored, as SIGHUP is under `nohup`, stays ignored. Does nothing in other threads, which
    cannot handle signals.
    """
    received = ReceivedSignal()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def end(number: int, frame: FrameType | None) -> None:
        received.number = number
        for handled in previous:
            signal.signal(handled, signal.SIG_IGN)
        if raises():
            raise KeyboardInterrupt

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {n: handler for n, handler in previous.items() if handler != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, end)
    try:
        yield received
    finally:
        if received.number is None:
            for number, handler in previous.items():
                signal.signal(number, handler)


def signal_status(exit: SystemExit) -> int | None:
    """The exit status if a signal caused the exit; else None."""
    if exit.code == _RAY_START_STATUS:
        return 128 + signal.SIGTERM
    return exit.code if isinstance(exit.code, int) and exit.code in STATUSES else None


def print_interrupted(continues: bool) -> None:
    """Print one line to standard error, unless the terminal is closed.

    `continues`: the same command continues where this one stopped.
    """
    line = "interrupted"
    if continues:
        line += ": the same command continues where this one stopped"
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr)
        sys.stderr.flush()
