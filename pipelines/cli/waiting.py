"""What a terminal shows while a job waits: what for, and for how long."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SHOWN_AFTER, _EVERY = 1.0, 0.5  # seconds


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show `what … 12 s` on standard error until the block ends, then clear the line.

    Nothing is written where standard error is no terminal: a log has no use for it.
    """
    if not _is_terminal():
        yield
        return
    ended, start = threading.Event(), time.monotonic()
    terminal = os.dup(sys.stderr.fileno())  # the block may redirect standard error

    def show() -> None:
        delay, shown = _SHOWN_AFTER, False
        while not ended.wait(delay):
            delay, shown = _EVERY, True
            line = f"\r{what} … {time.monotonic() - start:.0f} s\x1b[K"
            os.write(terminal, line.encode())
        if shown:
            os.write(terminal, b"\r\x1b[K")

    thread = threading.Thread(target=show, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.close(terminal)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
