"""Which rows an optimiser step sees, and how they are read.

The order is a pure function of the keys in the table, the seed and the epoch: rows are sorted by
`key`, then permuted. Step `s` takes the rows at positions `s·G … (s+1)·G - 1` of the endless
sequence of epochs (G = global batch size), so no batch is short: one that reaches an epoch's end
goes on with the next epoch. Those rows are cut into micro-batches, and micro-batch `i` belongs to
the worker of rank `i mod W` (W = number of workers). So which rows pass through the model together
does not depend on the number of workers, on files or on timing, and any step can be read without
the ones before it.

The keys are those that the run began with. A row that is gone since leaves its place empty: the others
stay in their steps and micro-batches (kept_rows).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.images.random_access import RowReader
from pipelines.training.config import TrainConfig
from vlv_model.squares import Square


def mix(*values: int) -> int:
    """A 64-bit hash of integers: seeds for the draws that belong to a (seed, epoch, key)."""
    return int(np.random.SeedSequence([v % 2**64 for v in values]).generate_state(1, np.uint64)[0])


def keys_digest(keys: Sequence[int]) -> int:
    """64 bits that tell which keys these are, in any order; those of parts add up, modulo 2**64.

    Each key is scattered by the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    with np.errstate(over="ignore"):
        bits = np.array(keys, np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int((bits ^ (bits >> np.uint64(31))).sum(dtype=np.uint64))


class GlobalOrder:
    """The endless sequence of (epoch, row) that the run walks through; see the module's text.

    `positions` int64 `[rows]` say where each row lies today, -1 for one that is gone; default: where
    it lay.
    """

    def __init__(self, rows: int, seed: int, positions: np.ndarray | None = None) -> None:
        self.rows = rows
        self.seed = seed
        self.positions = np.arange(rows) if positions is None else positions
        self.is_whole = bool((self.positions >= 0).all())
        self._epoch = -1
        self._permutation = np.zeros(0, np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """int64 [rows]: the rows of one epoch in order."""
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._permutation, self._epoch = generator.permutation(self.rows), epoch
        return self._permutation

    def take(self, start: int, count: int) -> list[tuple[int, int]]:
        """(epoch, position of the row today) at places `start … start + count - 1` of the sequence,
        without the rows that are gone."""
        taken = []
        while count:
            epoch, offset = divmod(start, self.rows)
            here = self.permutation(epoch)[offset : offset + count]
            today = self.positions[here]
            taken += [(epoch, int(row)) for row in today if row >= 0]
            start, count = start + len(here), count - len(here)
        return taken


@dataclass(frozen=True)
class Batch:
    """One micro-batch before a stage makes tensors of it."""

    keys: list[int]
    epochs: list[int]  # -1: evaluation
    pixel_values: torch.Tensor  # uint8 [b 3 h w]
    columns: dict[str, list[Any]]

    @classmethod
    def read(cls, reader: RowReader, rows: Sequence[tuple[int, int]], square: Square) -> Batch:
        """The rows, each (epoch, position), in the order given."""
        columns: dict[str, list[Any]] = {name: [] for name in reader.columns}
        for _, position in rows:
            values = reader.row(position)
            for name in reader.columns:
                columns[name].append(values[name])
        return cls(
            keys=[int(reader.index.keys[position]) for _, position in rows],
            epochs=[epoch for epoch, _ in rows],
            pixel_values=torch.from_numpy(np.stack([reader.square(p, square) for _, p in rows])),
            columns=columns,
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
            columns={
                name: [value for part in parts for value in part.columns[name]]
                for name in parts[0].columns
            },
        )


class StepReader:
    """Reads ahead: the micro-batches of one worker, step by step, made ready in a thread.

    `begin` has rows read somewhere; the function that it returns waits for them, in that thread,
    and makes of them what the step takes.
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
        self.begin_rows = begin
        self.train = train
        self.world_rank = world_rank
        self.world_size = world_size

    def read(self, step: int) -> list[tuple[int, Any]]:
        """The micro-batches of `step` that this worker uses, each with its number in the step.

        At least one micro-batch: a worker without rows gets one of weight 0.
        """
        return self._finish(self._begin(step))

    def rows_of(self, step: int) -> int:
        """How many rows of `step` are left, over all workers."""
        size = self.train.global_batch_size
        return size if self.order.is_whole else len(self.order.take(step * size, size))

    def _begin(self, step: int) -> list[tuple[int, Callable[[], Any]]]:
        size = self.train.rows_at_once
        start = step * self.train.global_batch_size
        numbers = range(self.world_rank, self.train.micro_batches, self.world_size)
        taken = {i: self.order.take(start + i * size, size) for i in numbers}
        begun = [(i, self.begin_rows(rows)) for i, rows in taken.items() if rows]
        if not begun:
            finish = self.begin_rows([(0, 0)])  # any row will do
            begun = [(self.world_rank, lambda: finish().idle())]
        return begun

    def _finish(self, begun: list[tuple[int, Callable[[], Any]]]) -> list[tuple[int, Any]]:
        return [(i, finish()) for i, finish in begun]

    def steps(self, start: int) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
        """(step, micro-batches) from `start` on; a failure to read is raised where it is used."""
        stop = self.train.steps
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows") as pool:
            ahead: deque[Future[list[tuple[int, Any]]]] = deque()
            try:
                for step in range(start, stop):
                    # This one's, and those that are read while it is used.
                    while len(ahead) <= self.train.prefetch and step + len(ahead) < stop:
                        begun = self._begin(step + len(ahead))
                        ahead.append(pool.submit(self._finish, begun))
                    yield step, ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()
