"""Who reads the rows of a training: threads of its worker, or processes elsewhere on the cluster.

Both give the same batches, bit for bit: which rows they are is settled before (see `data`), and a
batch is put together in their order, whatever finishes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from typing import Any, Protocol

from pipelines.images.random_access import RowIndex, RowReader
from pipelines.training.data import Batch
from vlv_model.squares import Square

Rows = Sequence[tuple[int, int]]
"""(epoch, position in the index) of each."""


class Reading(Protocol):
    """Reads rows of an index: their squares, decoded and cropped, and the columns asked for."""

    def begin(self, rows: Rows) -> Callable[[], Batch]:
        """Have the rows read in the background; the function waits for them, or raises."""

    def close(self) -> None:
        """Give up what is still under way."""


class Threads:
    """Threads of this process; reading, decoding and resizing let go of the interpreter's lock."""

    def __init__(self, reader: RowReader, square: Square, threads: int) -> None:
        self.reader, self.square, self.threads = reader, square, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def begin(self, rows: Rows) -> Callable[[], Batch]:
        parts = [
            self._pool.submit(Batch.read, self.reader, piece, self.square)
            for piece in _pieces(rows, self.threads)
        ]
        return lambda: Batch.join([part.result() for part in parts])

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Actors:
    """Ray actors of one CPU each, wherever the cluster has one; Ray keeps GPU machines for the last.

    Not Ray tasks: an actor keeps footers and row groups of the table, of which a task would parse a
    footer for each row. One whose machine is lost starts elsewhere and does its work again.
    """

    def __init__(
        self, index: RowIndex, columns: Sequence[str], square: Square, actors: int
    ) -> None:
        import ray

        options = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": -1}
        # Said outright, or they would have to fit into what was reserved for the worker.
        kind: Any = ray.remote(scheduling_strategy="DEFAULT", **options)(_Reader)
        kept = ray.put(index)  # arrays of millions of rows: once on each machine
        self._actors = [kind.remote(kept, list(columns), square) for _ in range(actors)]
        self._turns = count()

    def begin(self, rows: Rows) -> Callable[[], Batch]:
        size = len(self._actors)
        parts = [
            self._actors[next(self._turns) % size].read.remote(piece)
            for piece in _pieces(rows, size)
        ]
        return lambda: _fetch(parts)

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)


class _Reader:
    """The process behind `Actors`."""

    def __init__(self, index: RowIndex, columns: list[str], square: Square) -> None:
        self.reader, self.square = RowReader(index, columns), square

    def read(self, rows: Rows) -> Batch:
        return Batch.read(self.reader, rows, self.square)


def _fetch(parts: Sequence[Any]) -> Batch:
    import ray
    from ray.exceptions import RayTaskError

    try:
        return Batch.join(ray.get(list(parts)))
    except RayTaskError as error:  # what reading raised, without the actor's traceback in its text
        raise error.cause from error


def _pieces(rows: Rows, most: int) -> list[Rows]:
    """Consecutive rows in at most so many parts of nearly the same length, none of them empty."""
    parts = min(most, len(rows))
    cuts = [len(rows) * i // parts for i in range(parts + 1)]
    return [rows[start:stop] for start, stop in pairwise(cuts)]
