"""A training job from its settings to its result: checks, Ray Train, and the loop on its workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.cli.config import build, dump
from pipelines.execution import checkpoints
from pipelines.execution.cluster import Cluster
from pipelines.execution.connection import check_resources, ray_session
from pipelines.images.latents import LatentReader
from pipelines.images.random_access import RowIndex, in_holdout
from pipelines.storage.files import as_path
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import parquet_files, read_json_object
from pipelines.training import checkpointing, kept_rows, run_folder, samples
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.metrics import MetricsSink
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, DataError, RunError, VLVError, one_line
from vlv_model.squares import Square

if TYPE_CHECKING:
    from pipelines.training.loop import Worker


def train(config: Stage1Config | Stage2Config) -> dict[str, Any]:
    """Run a stage to its end, or continue it where it was killed; returns its result.

    The result holds `loss_before` and `loss_after` (held-out; none where those rows are gone), `steps`,
    `rows_seen`, `checkpoint`, `columns_read` (of the table). Raises DataError, CheckpointError, RunError for what the user has to mend.
    """
    if config.ray.in_process:
        raise RunError(
            "ray.address=in-process: workers of a training are started by Ray: leave ray.address out for a "
            "Ray of the job's own, or give a running cluster"
        )
    run = open_run(config)
    config, run_dir = run.config, Path(run.config.run_dir)
    with lock_folder(run_dir, "run_dir"):
        run_folder.claim(run_dir, run.identity)
        if (run_dir / run_folder.RESULT).is_file():
            print(f"{run_dir} is finished: nothing to train")
            return read_json_object(run_dir / run_folder.RESULT)
        rows, held_out = run.rows
        kept_rows.keep(run_dir, run.keys, config.data.input)
        print(f"{len(rows):,} rows to train on, {len(held_out):,} held out", file=sys.stderr)
        parent = run_folder.keep_parent(run_dir, run.checkpoint)
        with ray_session(config.ray) as cluster:
            sampler = _sampler(config, run_dir, run.model, held_out)
            files = [str(file) for file in run.files]
            _fit(cluster, config, run_dir, run.model, parent, files, sampler)
        return run_folder.write_result(config, run_dir)


@dataclass(frozen=True)
class OpenedRun:
    """A training as it stands before any model is loaded."""

    config: Stage1Config | Stage2Config
    model: ModelConfig
    checkpoint: Path | None  # what it starts from
    files: list[Path]
    rows: tuple[RowIndex, RowIndex]  # trained on, held out
    keys: np.ndarray  # int64 [n], of all rows that the run began with
    identity: dict[str, Any]


def open_run(config: Stage1Config | Stage2Config) -> OpenedRun:
    """Look at data, models and run folder; nothing is written. Raises what `train` does."""
    run_dir = Path(config.run_dir)
    config = run_folder.settle(config, run_dir)
    there = run_folder.recorded(run_dir)
    parts = run_folder.parts_read(config)
    model, checkpoint = config.model.resolve(parts, run_folder.base_models(there))
    run_folder.check_start(config, checkpoint)
    if config.data.validation:
        run_folder.check_validation(config.data.validation)
    files = parquet_files(config.data.input)
    columns = [config.data.caption_column] if isinstance(config, Stage2Config) else []
    size = sum(file.stat().st_size for file in files)
    index = RowIndex.open(files, columns)
    left = kept_rows.go_on(run_dir, there, config.data.input, config.data.holdout, index, size)
    rows = split(left.rows, config.data.holdout, left.keys)
    if isinstance(config, Stage1Config) and config.data.latents:
        keys = np.concatenate([index.keys for index in rows])
        LatentReader(config.data.latents).check(model, keys)
    identity = run_folder.identity(config, model, checkpoint, files, rows, there) | left.identity
    run_folder.check_free(run_dir, identity)  # before a stranger's folder gets a lock file
    return OpenedRun(config, model, checkpoint, files, rows, left.keys, identity)


def show(config: Stage1Config | Stage2Config, result: dict[str, Any]) -> None:
    """Print a result's figures and where the run lies."""
    before, after = (_figure(result[name]) for name in ("loss_before", "loss_after"))
    print(
        f"held-out loss {before} → {after} after "
        f"{result['steps']:,} steps ({result['rows_seen']:,} rows)"
    )
    print(f"run: {config.run_dir}")
    if pages := sorted((Path(config.run_dir) / samples.FOLDER).glob("*.html")):
        print(f"samples: {pages[-1]}")


def _figure(loss: float | None) -> str:
    return "none (its rows are gone)" if loss is None else f"{loss:.4f}"


def split(
    index: RowIndex, holdout: float, began: np.ndarray | None = None
) -> tuple[RowIndex, RowIndex]:
    """(training rows, held-out rows); neither may be empty.

    But of what is left of the rows that a run `began` with (keys, int64 `[n]`), all held-out ones may
    be gone.
    """
    mask = in_holdout(index.keys, holdout)
    held = mask if began is None else in_holdout(began, holdout)
    if mask.all() or not held.any():
        side = "training" if mask.all() else "held-out"
        raise DataError(
            f"of {len(index)} usable rows none is a {side} row at data.holdout={holdout}: give more "
            "rows or another share (of a run whose rows were all taken down: begin another run_dir)"
        )
    return index.select(~mask), index.select(mask)


def _fit(
    cluster: Cluster,
    config: Stage1Config | Stage2Config,
    run_dir: Path,
    model: ModelConfig,
    parent: Path | None,
    files: list[str],
    sampler: samples.Sampler | None,
) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    train = config.train
    least = train.least_workers
    needed = {"CPU": least * (train.cpus_per_worker + train.readers)} | (
        {"GPU": least} if train.use_gpu else {}
    )
    check_resources(config.ray, cluster, needed, f"train.num_workers={train.num_workers}")
    run_folder.tidy(run_dir, train.keep_checkpoints)
    if not isinstance(train.num_workers, int):
        # A lost machine still counts as ready for a moment: soon after, ask for fewer (Ray: 60 s).
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    stage = "stage2" if isinstance(config, Stage2Config) else "stage1"
    # On the driver's machine, as Ray Train's controller: any other may go. What a queue that was
    # killed held is lost, which nobody has to know.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    beside = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": -1}
    beside |= {"max_task_retries": -1}
    events, refusals = Queue(actor_options=beside), Queue(actor_options=beside)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "stage": stage,
            "config": dump(config),
            "model": model.model_dump(),
            "parent": str(parent) if parent else None,
            "files": files,
            "events": events,
            "refusals": refusals,
        },
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            # A restart costs the steps since the last checkpoint: not for every machine that comes.
            elastic_resize_monitor_interval_s=300,
            resources_per_worker={
                "CPU": train.cpus_per_worker,
                **({"GPU": 1} if train.use_gpu else {}),
                **config.ray.pinned(),
            },
        ),
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        run_config=RunConfig(
            name=checkpoints.FOLDER,
            storage_path=str(run_dir),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    with MetricsSink(events, run_dir, stage, dump(config), sampler):
        trainer.fit()
    for queue in (events, refusals):
        queue.shutdown(force=True)  # a graceful end would be tried again, without an end


def _sampler(
    config: Stage1Config | Stage2Config, run_dir: Path, model: ModelConfig, holdout: RowIndex
) -> samples.Sampler | None:
    train = config.train
    if not train.samples:
        return None
    named = config.data.validation
    shown = run_folder.validation_rows(run_dir, named) if named else holdout
    if not len(shown):
        return None
    captions, column, max_tokens = False, None, 0
    if isinstance(config, Stage2Config):
        captions, max_tokens = True, config.train.max_caption_tokens
        column = None if named else config.data.caption_column
    made = samples.Samples(
        run_dir,
        model,
        shown.select(np.arange(len(shown)) < train.samples),
        captions=captions,
        caption_column=column,
        max_tokens=max_tokens,
        isolated=bool(named),
    )
    return samples.Sampler(made, train.steps, train.use_gpu, config.ray.pinned())


def _worker(loop: dict[str, Any]) -> None:
    """What each worker of Ray Train runs: the training, unless its input was refused before.

    A lost machine is worth another attempt, a bad row, a bad setting or a full GPU is not: Ray Train
    restarts after each, so the second time says at once what the first one found.
    """
    train_or_refuse(loop, _train_on_worker)


def train_or_refuse(loop: dict[str, Any], work: Callable[[dict[str, Any]], None]) -> None:
    """Have `work` done, unless it was refused before; `loop["refusals"]` is a queue of all workers."""
    import torch

    refusals = loop["refusals"]
    if not refusals.empty():
        refused = refusals.get()
        refusals.put(refused)  # for the other workers
        raise refused
    try:
        work(loop)
    except VLVError as error:
        refusals.put(type(error)(str(error)))
        raise
    except torch.OutOfMemoryError as error:
        refused = RunError(f"a GPU's memory is full ({one_line(error)}): {_relief(loop)}")
        refusals.put(refused)
        raise refused from error


def _relief(loop: dict[str, Any]) -> str:
    """What takes less of a GPU's memory than the settings of a run, of what is not set yet."""
    train = loop["config"]["train"]
    switches = ("activation_checkpointing", "offload_optimizer")
    ways = [
        f"set train.{name}=true (also in a run that has begun)"
        for name in switches
        if not train[name]
    ]
    if (size := train["micro_batch_size"]) > 1:
        ways.append(f"begin a run with train.micro_batch_size below {size}")
    return ", or ".join([*ways, "take larger GPUs"])


def _train_on_worker(loop: dict[str, Any]) -> None:
    # Imports are here, since only workers need them.
    use_gpu = loop["config"]["train"]["use_gpu"]
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import ray.train
    import ray.train.torch
    import torch

    from pipelines.training.loop import Worker

    # torch's own default takes TF32 for convolutions, and not for matrices.
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = loop["config"]["train"]["tf32"]
    if not use_gpu:
        # An optional kernel for CPUs whose compilation takes half a minute on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    context = ray.train.get_context()
    worker = Worker(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device(),
        is_first_of_machine=context.get_local_rank() == 0,
    )
    deepspeed.init_distributed(
        dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
    run_worker(loop, worker, loop["events"].put, _machines_called_back)


def _machines_called_back() -> set[str]:
    """Nodes of this training that will soon be gone (spot notices); the same set on all ranks."""
    import ray.train

    notice = ray.train.get_preemption_info()
    return set(notice.preempted_node_ids) if notice else set()


def run_worker(
    loop: Mapping[str, Any],
    worker: Worker,
    emit: Callable[[dict[str, Any]], None],
    called_back: Callable[[], set[str]],
) -> None:
    """Train on one of the processes of a process group that stands already.

    `emit` and `called_back` are the Trainer's.
    """
    from pipelines.training.loop import Trainer
    from pipelines.training.stages import stage1, stage2
    from vlv_model.checkpoints.weights import CheckpointMetadata

    model = ModelConfig(**loop["model"])
    run_dir = Path(loop["config"]["run_dir"])
    if worker.world_rank == 0:
        checkpointing.drop_unwritten(run_dir)
    last = _resume_from(run_dir, worker)
    parent = Path(loop["parent"]) if loop["parent"] else None
    if (start := last or parent) is not None:
        _verify(start, worker)
    config: Stage1Config | Stage2Config
    if loop["stage"] == "stage1":
        config = build(Stage1Config, loop["config"])
        stage = stage1(config, model, start)
    else:
        config = build(Stage2Config, loop["config"])
        stage = stage2(config, model, start)
    index = RowIndex.open([as_path(file) for file in loop["files"]], stage.columns)
    if (began := kept_rows.kept(run_dir)) is None:
        began = index.keys
    index = index.select(np.isin(index.keys, began))  # what was added since waits for a new run
    rows, holdout = split(index, config.data.holdout, began)
    held = in_holdout(began, config.data.holdout)

    def metadata(step: int) -> CheckpointMetadata:
        return CheckpointMetadata(
            stage=stage.name,
            step=step,
            rows_seen=step * config.train.global_batch_size,
            config=loop["config"],
            model=model,
            parent=loop["parent"],
        )

    trainer = Trainer(
        stage,
        config.train,
        Square.of(model),
        rows,
        holdout,
        (began[~held], began[held]),
        worker,
        emit=emit,
        called_back=called_back,
        metadata=metadata,
        run_dir=run_dir,
    )
    trainer.start(last)
    trainer.run()


def _verify(checkpoint: Path, worker: Worker) -> None:
    """Hold its files against their digests, once on each machine: they may be 40 GB.

    Raises CheckpointError on all ranks alike.
    """
    import torch.distributed as dist

    from vlv_model.checkpoints.files import verify_checkpoint

    refused: list[str | None] = [None] * worker.world_size
    why = None
    if worker.is_first_of_machine:
        try:
            verify_checkpoint(checkpoint)
        except (CheckpointError, OSError) as error:  # whatever it is: the others wait for it
            why = str(error)
    if worker.world_size > 1:
        dist.all_gather_object(refused, why)
    else:
        refused = [why]
    if found := [text for text in refused if text]:
        raise CheckpointError(found[0])


def _resume_from(run_dir: Path, worker: Worker) -> Path | None:
    """The newest finished checkpoint of the run, as rank 0 sees it: a shared disk may lag."""
    import torch.distributed as dist

    found = [checkpoints.latest_checkpoint(run_dir)]
    if worker.world_size > 1:
        dist.broadcast_object_list(found, src=0, device=worker.device)
    return found[0]
