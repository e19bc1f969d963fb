"""Which rows a training step uses, and how they are read.

The order is a pure function of the keys in the table, the seed and the epoch: rows are sorted by
`key`, then permuted. Step `s` takes the rows at positions `s·G … (s+1)·G - 1` of the endless
sequence of epochs (G = global batch size), so no batch is short: a batch that reaches the end of an
epoch continues in the next. The rows of a step are cut into micro-batches, and micro-batch `i` goes
to the worker of rank `i mod W` (W = number of workers). So the micro-batches do not depend on the
number of workers, on files or on timing, and any step can be read without the steps before it.

The keys are those that the run began with. A row removed since then leaves its position empty, and
so does one whose image cannot be used; all other rows stay in their steps and micro-batches (see
`run_rows` and `skipped_rows`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipelines.images.external import UndecodableImage
from pipelines.training.config import TrainConfig
from pipelines.training.skipped_rows import SkippedRow, skipped_row
from vlv_model.errors import DataError
from vlv_model.squares import Square

if TYPE_CHECKING:
    from pipelines.images.random_access import RowReader

PREFETCHED_STEPS = 2
"""Steps whose rows are read ahead."""

_CANDIDATES = 64  # rows to try where any row will do


def keys_digest(keys: Sequence[int]) -> int:
    """A 64-bit digest of a set of keys; digests of disjoint sets add up to that of their union.

    It is the sum, modulo 2**64, of each key's SplitMix64 hash (Steele, Lea, Flood 2014).
    """
    with np.errstate(over="ignore"):
        bits = np.array(keys, np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int((bits ^ (bits >> np.uint64(31))).sum(dtype=np.uint64))


class GlobalOrder:
    """The endless sequence of (epoch, row) that a run trains on; see the module docstring.

    `positions` int64 `[rows]`: the current position of each row in the index, -1 for a removed row;
    default: every row in its place.
    """

    def __init__(self, rows: int, seed: int, positions: np.ndarray | None = None) -> None:
        self.rows = rows
        self.seed = seed
        self.positions = np.arange(rows) if positions is None else positions
        self.is_complete = bool((self.positions >= 0).all())
        self._epoch = -1
        self._permutation = np.zeros(0, np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """int64 `[rows]`: the rows of one epoch in order."""
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._permutation, self._epoch = generator.permutation(self.rows), epoch
        return self._permutation

    def present(self) -> np.ndarray:
        """The current positions of the rows that are not removed, int64 `[n]`."""
        return self.positions[self.positions >= 0]

    def take(self, start: int, count: int) -> list[tuple[int, int]]:
        """Elements `start … start + count - 1` of the sequence as (epoch, current position).

        Removed rows are left out.
        """
        taken = []
        while count:
            epoch, offset = divmod(start, self.rows)
            rows = self.permutation(epoch)[offset : offset + count]
            taken += [(epoch, int(row)) for row in self.positions[rows] if row >= 0]
            start, count = start + len(rows), count - len(rows)
        return taken


@dataclass(frozen=True)
class Batch:
    """The rows of one micro-batch, as read from the table."""

    keys: list[int]
    epochs: list[int]  # -1: evaluation
    pixel_values: torch.Tensor  # uint8 [b 3 h w]
    failed: list[SkippedRow] = field(default_factory=list)  # rows that are not in it

    @classmethod
    def read(
        cls,
        reader: RowReader,
        rows: Sequence[tuple[int, int]],
        square: Square,
        skip: bool = False,
    ) -> Batch:
        """Read `rows`, each (epoch, position), in the order given.

        Raises DataError for an image that cannot be read or decoded; with `skip` it is left out.
        """
        keys, epochs, squares, failed = [], [], [], []
        for epoch, position in rows:
            key = int(reader.index.keys[position])
            try:
                squares.append(reader.square(position, square))
            except UndecodableImage as error:
                if not skip:
                    raise
                failed.append(skipped_row(epoch, key, error.kind, error))
                continue
            keys.append(key)
            epochs.append(epoch)
        empty = np.zeros((0, 3, square.size, square.size), np.uint8)
        return cls(
            keys=keys,
            epochs=epochs,
            pixel_values=torch.from_numpy(np.stack(squares) if squares else empty),
            failed=failed,
        )

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> Batch:
        """The rows of all parts in their order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            keys=[key for part in parts for key in part.keys],
            epochs=[epoch for part in parts for epoch in part.epochs],
            pixel_values=torch.cat([part.pixel_values for part in parts]),
            failed=[row for part in parts for row in part.failed],
        )


NO_ROW = object()
"""In place of a micro-batch whose rows are all left out."""


class StepReader:
    """Prefetches the micro-batches of one worker in a thread.

    `begin` starts reading rows and returns a function; the thread calls that function, which waits
    for the rows and returns the micro-batch, or NO_ROW.
    """

    def __init__(
        self,
        order: GlobalOrder,
        begin: Callable[[Sequence[tuple[int, int]]], Callable[[], Any]],
        train: TrainConfig,
        world_rank: int,
        world_size: int,
    ) -> None:
        self.order = order
        self.begin_micro_batch = begin
        self.train = train
        self.world_rank = world_rank
        self.world_size = world_size

    def read(self, step: int) -> list[tuple[int, Any]]:
        """This worker's micro-batches of `step`, each with its number in the step.

        At least one: a worker without rows gets a micro-batch without valid tokens.
        """
        return self._finish(self._begin(step))

    def rows_of(self, step: int) -> int:
        """The number of rows in `step`, over all workers, without removed ones."""
        size = self.train.global_batch_size
        return size if self.order.is_complete else len(self.order.take(step * size, size))

    def _begin(self, step: int) -> list[tuple[int, Callable[[], Any]]]:
        size = self.train.rows_at_once
        start = step * self.train.global_batch_size
        numbers = range(self.world_rank, self.train.micro_batches, self.world_size)
        taken = {i: self.order.take(start + i * size, size) for i in numbers}
        return [(i, self.begin_micro_batch(rows)) for i, rows in taken.items() if rows]

    def _finish(self, pending: list[tuple[int, Callable[[], Any]]]) -> list[tuple[int, Any]]:
        batches = [(i, finish()) for i, finish in pending]
        batches = [(i, batch) for i, batch in batches if batch is not NO_ROW]
        return batches or [(self.world_rank, self.without_rows())]

    def without_rows(self) -> Any:
        """A micro-batch without valid tokens, made of any row that can be read."""
        for row in self.order.present()[:_CANDIDATES]:
            if (batch := self.begin_micro_batch([(0, int(row))])()) is not NO_ROW:
                return batch.without_rows()
        raise DataError(f"none of the first {_CANDIDATES} images can be used")

    def steps(self, start: int) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
        """Yield (step, micro-batches) from `start` on; a read error is raised at its step."""
        stop = self.train.steps
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows") as pool:
            ahead: deque[Future[list[tuple[int, Any]]]] = deque()
            try:
                for step in range(start, stop):
                    # This step and those after it.
                    while len(ahead) <= PREFETCHED_STEPS and step + len(ahead) < stop:
                        pending = self._begin(step + len(ahead))
                        ahead.append(pool.submit(self._finish, pending))
                    yield step, ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()
