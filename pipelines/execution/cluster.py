"""What a job works on: a Ray, or this process alone; what it has, and how chunks pass through it."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

# Chunks whose descriptors are handed to Ray Data at once: bounds what the driver holds.
CHUNKS_PER_WAVE = 4096
Step = Callable[[pa.Table], pa.Table]
"""What is done with a chunk, as one block."""
WHOLE = {"batch_size": None, "batch_format": "pyarrow"}
"""Options of `map_batches` with which a chunk stays one block all the way."""


class Cluster(Protocol):
    """The machines of a job."""

    seconds_here: float
    """Seconds of work for which it is not worth while to start workers."""

    def resources(self) -> Mapping[str, float]:
        """What all machines have together, by Ray's names: CPU, GPU, and groups of machines."""

    def cpus_by_node(self) -> list[float]:
        """CPUs of each machine that is there."""

    def datasets(self, chunks: Sequence[int]) -> Iterator[Any]:
        """Ray Datasets of `chunk`, one block for each, of no more chunks than a driver may hold."""

    def actors(self, least: int, most: int | None, **options: Any) -> Any:
        """A pool of actors, as the `compute` option of `map_batches`."""


class RayCluster:
    """The Ray that is connected."""

    def __init__(self, seconds_here: float = 3.0) -> None:
        self.seconds_here = seconds_here

    def resources(self) -> Mapping[str, float]:
        import ray

        there: dict[str, float] = ray.cluster_resources()
        return there

    def cpus_by_node(self) -> list[float]:
        import ray

        return [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]

    def datasets(self, chunks: Sequence[int]) -> Iterator[Any]:
        import ray.data

        context = ray.data.DataContext.get_current()
        _quiet_ray_data()
        context.enable_progress_bars = False  # ours counts rows and failures, not blocks
        context.raise_original_map_exception = True  # so that a refusal keeps its class
        context.target_max_block_size = None  # a chunk is never cut in two
        # By default a kill while a model loads ends a job.
        context.max_consecutive_actor_init_deaths = 2
        for start in range(0, len(chunks), CHUNKS_PER_WAVE):
            wave = chunks[start : start + CHUNKS_PER_WAVE]
            yield ray.data.from_items(
                [{"chunk": chunk} for chunk in wave], override_num_blocks=len(wave)
            )

    def actors(self, least: int, most: int | None, **options: Any) -> Any:
        import ray.data

        return ray.data.ActorPoolStrategy(min_size=least, max_size=most, **options)


def _quiet_ray_data() -> None:
    # Its loggers are set up when ray.data is imported; the file handlers are left as they are.
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.WARNING)


class InProcess:
    """No Ray: chunks are worked on in this process, one after the other, by the steps of a Ray."""

    seconds_here = 0.0  # all of it is here, by way of `datasets`

    def resources(self) -> Mapping[str, float]:
        return {"CPU": float(os.cpu_count() or 1)}

    def cpus_by_node(self) -> list[float]:
        return [1.0]

    def datasets(self, chunks: Sequence[int]) -> Iterator[Any]:
        yield ChunksHere(pa.table({"chunk": [chunk]}) for chunk in chunks)

    def actors(self, least: int, most: int | None, **options: Any) -> Any:
        return None


class ChunksHere:
    """What a job asks of a Ray Dataset of chunks, done in this process and in order."""

    def __init__(self, blocks: Iterable[pa.Table]) -> None:
        self.blocks = blocks

    def map_batches(
        self, step: Any, fn_constructor_args: Sequence[Any] = (), **resources: Any
    ) -> ChunksHere:
        # What a cluster could not send to its machines is an error here, too.
        step, arguments = pickle.loads(pickle.dumps((step, fn_constructor_args)))
        return ChunksHere(self._mapped(step, arguments))

    def _mapped(self, step: Any, arguments: Sequence[Any]) -> Iterator[pa.Table]:
        is_actor = isinstance(step, type)
        do = step(*arguments) if is_actor else step
        try:
            yield from (do(block) for block in self.blocks if block.num_rows)  # as Ray does
        finally:
            if is_actor and hasattr(do, "close"):
                do.close()

    def iter_batches(self, **layout: Any) -> Iterator[pa.Table]:
        return iter(self.blocks)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return (row for block in self.blocks for row in block.to_pylist())
