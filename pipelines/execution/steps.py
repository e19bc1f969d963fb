"""A chunk, and the steps that it passes on the way to its part of the table.

    chunk number ──▶ step ──▶ … ──▶ step ──▶ commit

A step takes chunks and gives chunks. A function takes one at a time; a step that holds a model
(ModelStep) takes a stream of them, so that it can work on several at once. Reading, writing and
counting belong to the frame (pipelines.execution.chunks), which calls the steps on a cluster
(pipelines.execution.cluster).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa


class ModelDiedError(RuntimeError):
    """A model fails for everything: its process has to be replaced."""


def _no_rows() -> pa.Table:
    import pyarrow as pa

    return pa.table({})


@dataclass(frozen=True)
class Chunk:
    """The rows that are processed and committed together; the first step gets none."""

    number: int
    rows: pa.Table = field(default_factory=_no_rows)
    busy: float = 0.0
    """Seconds that the step with the model worked since it finished its last chunk."""
    present: float = 0.0
    """Seconds since then, waiting for chunks included."""

    def to_block(self) -> pa.Table:
        """The chunk as a block of Ray Data.

        Ray Data drops a block without rows, so an empty chunk has a row of nulls there.
        """
        import pyarrow as pa

        rows = self.rows
        if not rows.num_rows:
            rows = pa.table([pa.nulls(1, field.type) for field in rows.schema], rows.schema)
        columns = {name: rows[name] for name in rows.column_names}
        length = max(1, rows.num_rows)
        for name, value in (
            ("chunk_number", pa.scalar(self.number, pa.int64())),
            ("chunk_rows", pa.scalar(self.rows.num_rows, pa.int64())),
            ("chunk_busy", pa.scalar(self.busy, pa.float64())),
            ("chunk_present", pa.scalar(self.present, pa.float64())),
        ):
            columns[name] = pa.repeat(value, length)
        fields = [*rows.schema, *((n, columns[n].type) for n in _OF_CHUNK)]
        return pa.table(columns, schema=pa.schema(fields, rows.schema.metadata))

    @classmethod
    def of_block(cls, block: pa.Table) -> Chunk:
        """The chunk that `to_block` has put into a block."""
        number, rows, busy, present = (block[name][0].as_py() for name in _OF_CHUNK)
        return cls(number, block.drop_columns(list(_OF_CHUNK)).slice(0, rows), busy, present)


_OF_CHUNK = ("chunk_number", "chunk_rows", "chunk_busy", "chunk_present")


class ModelStep(Protocol):
    """A step that holds a model. Its class is called in each actor, with the step's arguments."""

    failed: str
    """The status of a row that kills the process."""

    def process(self, chunks: Iterator[Chunk | None]) -> Iterator[Chunk]:
        """Make the rows of chunks, in any order; returns after the last one.

        `next(chunks)` waits only if no chunk is unfinished. Otherwise it gives None where none has
        come, so that the step goes on with those that it has. Chunks have `pixels` and `status`; rows
        whose status is not ok stay as they are. An empty chunk gives one with the right columns.

        An image that fails is a row with a status. Raises ModelDiedError if the model fails for all,
        which replaces the process, and VLVError to end the job. May be called again after it has
        returned.
        """

    def close(self) -> None:
        """Release what the step holds."""


class ChunkByChunk:
    """A ModelStep that finishes each chunk before the next: a subclass is called with it."""

    def __call__(self, chunk: Chunk) -> Chunk:
        """Make the rows of a chunk."""
        raise NotImplementedError

    def process(self, chunks: Iterator[Chunk | None]) -> Iterator[Chunk]:
        return (self(chunk) for chunk in chunks if chunk is not None)

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class PlacedStep:
    """A step, and what it needs of the cluster."""

    step: Any
    """A function of a chunk, for tasks; or, for actors, a class that is made of `arguments`: of
    ModelSteps, or of functions."""
    arguments: tuple[Any, ...] = ()
    resources: Mapping[str, Any] = field(default_factory=dict)
    """What a task or an actor takes, in Ray's words: num_cpus, num_gpus, resources."""
    actors: tuple[int, int | None] = (1, None)
    """The fewest and the most actors; None: as many as there is work for."""
    in_flight: int = 1
    """Chunks that an actor works on at once."""
    then: Callable[[Chunk], Chunk] | None = None
    """Called with each result in the same process."""

    @property
    def has_actors(self) -> bool:
        return isinstance(self.step, type)

    def finished(self, chunk: Chunk) -> Chunk:
        """The result of the step after `then`."""
        return chunk if self.then is None else self.then(chunk)
