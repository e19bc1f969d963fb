"""How a job ends that a signal tells to: as by Ctrl-C, with the status that a shell gives the signal.

SIGTERM comes from `kill`, schedulers and machines that are called back, SIGHUP from a terminal that
is closed. The handler raises KeyboardInterrupt, which Ray's core can carry through its C++: of a
SystemExit that is raised while it waits it makes an abort.
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
_DURING_RAYS_START = int(signal.SIGTERM)  # Ray's own handler, until it is connected


class Asked:
    """Whether a signal asked this process to end, and which."""

    number: int | None = None

    @property
    def status(self) -> int | None:
        """The exit status of the signal, None where there was none."""
        return None if self.number is None else 128 + self.number


@contextmanager
def interrupted_by_signals(raises: Callable[[], bool] = lambda: True) -> Iterator[Asked]:
    """Have SIGNALS raise KeyboardInterrupt in the main thread, once; further ones are ignored.

    `raises` may say that nothing is to be raised, as an error is unwinding already. What is ignored
    already, as SIGHUP under `nohup`, stays so. Other threads than the main one may not listen.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def end(number: int, frame: FrameType | None) -> None:
        asked.number = number
        for one in others:
            signal.signal(one, signal.SIG_IGN)
        if raises():
            raise KeyboardInterrupt

    others = {one: signal.getsignal(one) for one in SIGNALS}
    others = {one: handler for one, handler in others.items() if handler != signal.SIG_IGN}
    for one in others:
        signal.signal(one, end)
    try:
        yield asked
    finally:
        if asked.number is None:
            for one, handler in others.items():
                signal.signal(one, handler)


def status_of(ended: SystemExit) -> int | None:
    """The status of an exit that a signal brought about; None of any other one."""
    if ended.code == _DURING_RAYS_START:
        return 128 + signal.SIGTERM
    return ended.code if isinstance(ended.code, int) and ended.code in STATUSES else None


def say_interrupted() -> None:
    """One line on standard error, unless the terminal is gone."""
    with suppress(OSError, ValueError):
        print("interrupted: the same command continues where this one stopped", file=sys.stderr)
        sys.stderr.flush()
