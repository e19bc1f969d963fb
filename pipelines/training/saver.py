"""Writes checkpoints in a thread, so that training waits for the copy to the CPU, not for the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Saver:
    """A thread that writes one checkpoint at a time.

    An error in the thread is raised by the next `submit` or `wait`. A killed process leaves a temporary
    folder, which the next start of the run removes.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Wait for the previous checkpoint, then run `write` in the thread."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        """Wait until everything is written; raises the error of a failed write."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
