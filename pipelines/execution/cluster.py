"""Where a job runs: on a Ray cluster, or in this process alone. Both pass chunks through its steps."""

from __future__ import annotations

import logging
import os
import pickle
import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

from pipelines.execution.steps import Chunk, ModelDiedError, ModelStep, PlacedStep
from vlv_model.errors import RunError, VLVError

CHUNKS_PER_WAVE = 4096
"""Chunks that Ray Data gets at once, which bounds the driver's memory."""
_GRACE = 10.0  # seconds for a step to end with its actor
# Options of Ray Data that keep a chunk in one block.
_WHOLE = {"batch_size": None, "batch_format": "pyarrow"}


class Cluster(Protocol):
    """The machines of a job."""

    seconds_here: float
    """Seconds of work that the driver does itself, since workers would take as long to start."""

    def resources(self) -> Mapping[str, float]:
        """The resources of all machines together, by Ray's names: CPU, GPU, node groups."""

    def cpus_by_node(self) -> list[float]:
        """CPUs of each live machine."""

    def pass_chunks(self, chunks: Sequence[int], steps: Sequence[PlacedStep]) -> Iterator[Chunk]:
        """Pass chunks, by their numbers, through `steps`; in any order."""

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

    def pass_chunks(self, chunks: Sequence[int], steps: Sequence[PlacedStep]) -> Iterator[Chunk]:
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
            blocks = [row for chunk in wave for row in Chunk(chunk).to_block().to_pylist()]
            dataset = ray.data.from_items(blocks, override_num_blocks=len(blocks))
            for step in steps:
                dataset = _mapped(dataset, step)
            for block in dataset.iter_batches(**_WHOLE):
                yield Chunk.of_block(block)

    def shared(self, kind: type) -> Any:
        import ray

        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(kind)
        return actor.remote()


def _mapped(dataset: Any, step: PlacedStep) -> Any:
    """A Ray Dataset after a step."""
    if not step.has_actors:
        return dataset.map_batches(_Task(step), **step.resources, **_WHOLE)
    import ray.data

    fewest, most = step.actors
    pool = ray.data.ActorPoolStrategy(
        min_size=fewest,
        max_size=most,
        max_concurrent_calls_per_actor=step.in_flight,
        max_tasks_in_flight_per_actor=step.in_flight + 1,  # the next one is fetched meanwhile
        enable_true_multi_threading=True,
    )
    actor = _ModelActor if hasattr(step.step, "process") else _Actor
    # `map_batches` itself takes no whole blocks where GPUs are requested.
    return dataset.map_batches_internal(
        actor, fn_constructor_args=(step,), compute=pool, **step.resources, **_WHOLE
    )


class _Task:
    """A step of one chunk at a time, on blocks."""

    def __init__(self, placed: PlacedStep) -> None:
        self.placed, self.step = placed, placed.step

    def __call__(self, block: pa.Table) -> pa.Table:
        return self.placed.finished(self.step(Chunk.of_block(block))).to_block()


class _Actor(_Task):
    """The same, in an actor, which calls it from several threads."""

    def __init__(self, placed: PlacedStep) -> None:
        self.placed, self.step = placed, placed.step(*placed.arguments)


class _ModelActor:
    """The actor of a ModelStep. Ray calls it in several threads, each with a chunk; one more thread
    runs the step, which takes the chunks out of a queue."""

    def __init__(self, placed: PlacedStep) -> None:
        self.placed = placed
        self.calls: _Calls = queue.SimpleQueue()
        step: ModelStep | VLVError
        try:
            step = placed.step(*placed.arguments)
        except VLVError as error:
            # Ray would take an error of a constructor for a death, repeat it, and hide its message.
            step = error
        # Without a reference to the actor, so that Ray's end of it ends the thread.
        self.thread = threading.Thread(target=_serve, args=(step, self.calls), daemon=True)
        self.thread.start()

    def __call__(self, block: pa.Table) -> pa.Table:
        made: Future[Chunk] = Future()
        self.calls.put((Chunk.of_block(block), made))
        return self.placed.finished(made.result()).to_block()

    def __del__(self) -> None:
        self.calls.put(None)
        self.thread.join(timeout=_GRACE)


_Calls = queue.SimpleQueue[tuple[Chunk, Future[Chunk]] | None]


def _serve(step: ModelStep | VLVError, calls: _Calls) -> None:
    """Answer calls with the results of a step; after an error, with the error."""
    unfinished: dict[int, Future[Chunk]] = {}

    def chunks() -> Iterator[Chunk | None]:
        while True:
            try:
                call = calls.get(block=not unfinished)
            except queue.Empty:
                yield None
                continue
            if call is None:
                return
            chunk, unfinished[chunk.number] = call
            yield chunk

    try:
        if isinstance(step, VLVError):
            raise step
        for chunk in step.process(chunks()):
            unfinished.pop(chunk.number).set_result(chunk)
        step.close()
    except ModelDiedError as error:
        # An error would end the job; Ray replaces a process that exits, and reloads the model.
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except BaseException as error:
        for made in unfinished.values():
            made.set_exception(error)
        while (call := calls.get()) is not None:
            call[1].set_exception(error)


def _quiet_ray_data() -> None:
    # The import of ray.data sets its loggers up; the file handlers stay as they are.
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.WARNING)


class InProcess:
    """No Ray: this process takes the chunks through the same steps."""

    seconds_here = 0.0  # `pass_chunks` does all work here anyway

    def resources(self) -> Mapping[str, float]:
        return {"CPU": float(os.cpu_count() or 1)}

    def cpus_by_node(self) -> list[float]:
        return [1.0]

    def pass_chunks(self, chunks: Sequence[int], steps: Sequence[PlacedStep]) -> Iterator[Chunk]:
        passed: Iterator[Chunk] = map(Chunk, chunks)
        for step in steps:
            # A step that a cluster could not pickle is an error here, too.
            passed = _passed(pickle.loads(pickle.dumps(step)), passed)
        return passed

    def shared(self, kind: type) -> Any:
        return None


def _passed(placed: PlacedStep, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Chunks after a step, in this process."""
    step = placed.step(*placed.arguments) if placed.has_actors else placed.step
    try:
        made = step.process(chunks) if hasattr(step, "process") else map(step, chunks)
        yield from map(placed.finished, made)
    except ModelDiedError as error:
        raise RunError(str(error)) from error
    finally:
        if hasattr(step, "close"):
            step.close()
