"""Where a job runs: on a Ray cluster, or in this process alone. Both pass chunks through its steps."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

CHUNKS_PER_WAVE = 4096
"""Chunks that Ray Data gets at once, which bounds the driver's memory."""
Step = Callable[[pa.Table], pa.Table]
"""Turns the block of a chunk into the next one."""
WHOLE = {"batch_size": None, "batch_format": "pyarrow"}
"""Options of `map_batches` that keep a chunk in one block."""


class Cluster(Protocol):
    """The machines of a job."""

    seconds_here: float
    """Seconds of work that the driver does itself, since workers would take as long to start."""

    def resources(self) -> Mapping[str, float]:
        """The resources of all machines together, by Ray's names: CPU, GPU, node groups."""

    def cpus_by_node(self) -> list[float]:
        """CPUs of each live machine."""

    def datasets(self, chunks: Sequence[int]) -> Iterator[Any]:
        """Ray Datasets with one block for each chunk (one row: `chunk`), in waves of bounded size."""

    def actors(self, least: int, most: int | None, **options: Any) -> Any:
        """A pool of actors, for the `compute` option of `map_batches`."""

    def shared(self, kind: type) -> Any:
        """The handle of one actor of this class, for all processes of the job as long as it is held;
        None if this process is the only one. If the actor dies it begins again.
        """


class RayCluster:
    """The Ray that this process is connected to."""

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
        context.enable_progress_bars = False  # our bar counts rows and failures, not blocks
        context.raise_original_map_exception = True  # keeps the class of our errors
        context.target_max_block_size = None  # never splits a chunk
        # By default one kill while a model loads ends the job.
        context.max_consecutive_actor_init_deaths = 2
        for start in range(0, len(chunks), CHUNKS_PER_WAVE):
            wave = chunks[start : start + CHUNKS_PER_WAVE]
            yield ray.data.from_items(
                [{"chunk": chunk} for chunk in wave], override_num_blocks=len(wave)
            )

    def actors(self, least: int, most: int | None, **options: Any) -> Any:
        import ray.data

        return ray.data.ActorPoolStrategy(min_size=least, max_size=most, **options)

    def shared(self, kind: type) -> Any:
        import ray

        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(kind)
        return actor.remote()


def _quiet_ray_data() -> None:
    # The import of ray.data sets its loggers up; the file handlers stay as they are.
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.WARNING)


class InProcess:
    """No Ray: this process takes the chunks through the same steps, one after the other."""

    seconds_here = 0.0  # `datasets` does all work here anyway

    def resources(self) -> Mapping[str, float]:
        return {"CPU": float(os.cpu_count() or 1)}

    def cpus_by_node(self) -> list[float]:
        return [1.0]

    def datasets(self, chunks: Sequence[int]) -> Iterator[Any]:
        yield LocalDataset(pa.table({"chunk": [chunk]}) for chunk in chunks)

    def actors(self, least: int, most: int | None, **options: Any) -> Any:
        return None

    def shared(self, kind: type) -> Any:
        return None


class LocalDataset:
    """The part of Ray Dataset that jobs use, in this process and in order."""

    def __init__(self, blocks: Iterable[pa.Table]) -> None:
        self.blocks = blocks

    def map_batches(
        self, step: Any, fn_constructor_args: Sequence[Any] = (), **resources: Any
    ) -> LocalDataset:
        # A step that a cluster could not pickle is an error here, too.
        step, arguments = pickle.loads(pickle.dumps((step, fn_constructor_args)))
        return LocalDataset(self._mapped(step, arguments))

    def _mapped(self, step: Any, arguments: Sequence[Any]) -> Iterator[pa.Table]:
        is_actor = isinstance(step, type)
        do = step(*arguments) if is_actor else step
        try:
            yield from (
                do(block) for block in self.blocks if block.num_rows
            )  # Ray drops empty ones
        finally:
            if is_actor and hasattr(do, "close"):
                do.close()

    def iter_batches(self, **layout: Any) -> Iterator[pa.Table]:
        return iter(self.blocks)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return (row for block in self.blocks for row in block.to_pylist())
