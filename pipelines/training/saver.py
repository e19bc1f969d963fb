"""Checkpoints written beside the training: it waits for the copies to the CPU, not for the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Saver:
    """One thread that writes one checkpoint after the other.

    What went wrong in the thread is raised by the next `submit`, or by `wait`. A process that is
    killed leaves a temporary folder, which the next start of the run removes.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Have `write` run as soon as the checkpoint before it is written."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        """Return when all is written; raise what a write raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
