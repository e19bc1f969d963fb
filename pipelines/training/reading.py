"""Reads training rows in threads of the worker, or in Ray actors elsewhere on the cluster.

Both give bit-identical batches: `data` decides which rows they hold, and parts are joined in order,
whichever finishes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from typing import Any, Protocol

from pipelines.images.random_access import Decode, RowIndex, RowReader
from pipelines.training.data import Batch
from vlv_model.squares import Square

Rows = Sequence[tuple[int, int]]
"""(epoch, position in the index) of each row."""


class BatchReader(Protocol):
    """Reads rows of an index: decoded and cropped squares."""

    def begin(self, rows: Rows, skip: bool = False) -> Callable[[], Batch]:
        """Start reading in the background; the returned function waits for the batch, or raises.

        `skip` is that of `Batch.read`.
        """

    def close(self) -> None:
        """Cancel unfinished reads."""


class ReaderThreads:
    """Threads of this process; reading, decoding and resizing release the GIL."""

    def __init__(self, reader: RowReader, square: Square, threads: int) -> None:
        self.reader, self.square, self.threads = reader, square, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def begin(self, rows: Rows, skip: bool = False) -> Callable[[], Batch]:
        parts = [
            self._pool.submit(Batch.read, self.reader, piece, self.square, skip)
            for piece in _pieces(rows, self.threads)
        ]
        return lambda: Batch.join([part.result() for part in parts])

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class ReaderActors:
    """Ray actors of one CPU each, anywhere on the cluster; Ray uses GPU machines last.

    Actors rather than tasks, since an actor caches footers and row groups, while a task would parse a
    footer per row. An actor whose machine is lost restarts elsewhere and its reads are retried.
    """

    def __init__(
        self, index: RowIndex, square: Square, actors: int, decode: Decode | None = None
    ) -> None:
        import ray

        options = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": -1}
        # Without an explicit strategy, they would be placed in the worker's placement group.
        actor_class: Any = ray.remote(scheduling_strategy="DEFAULT", **options)(_Reader)
        shared_index = ray.put(index)  # large: one copy per machine
        self._actors = [actor_class.remote(shared_index, square, decode) for _ in range(actors)]
        self._turns = count()

    def begin(self, rows: Rows, skip: bool = False) -> Callable[[], Batch]:
        size = len(self._actors)
        parts = [
            self._actors[next(self._turns) % size].read.remote(piece, skip)
            for piece in _pieces(rows, size)
        ]
        return lambda: _fetch(parts)

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)


class _Reader:
    """One actor of `ReaderActors`."""

    def __init__(self, index: RowIndex, square: Square, decode: Decode | None) -> None:
        self.reader, self.square = RowReader(index, decode=decode), square

    def read(self, rows: Rows, skip: bool) -> Batch:
        return Batch.read(self.reader, rows, self.square, skip)


def _fetch(parts: Sequence[Any]) -> Batch:
    import ray
    from ray.exceptions import RayTaskError

    try:
        return Batch.join(ray.get(list(parts)))
    except RayTaskError as error:  # the original error, whose text has no actor traceback
        raise error.cause from error


def _pieces(rows: Rows, most: int) -> list[Rows]:
    """Split rows into at most `most` non-empty parts of nearly equal length."""
    parts = min(most, len(rows))
    cuts = [len(rows) * i // parts for i in range(parts + 1)]
    return [rows[start:stop] for start, stop in pairwise(cuts)]
