"""A training on its workers: what each Ray Train worker runs, from its checks to the training loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.cli.config import dump
from pipelines.execution.model import latest_checkpoint
from pipelines.images.random_access import Decode, RowIndex, in_holdout
from pipelines.storage.files import as_path
from pipelines.training import caption_index, checkpointing, run_rows
from pipelines.training.caption_index import CaptionIndex
from pipelines.training.config import Stage1Config, Stage2Config, TrainConfig
from pipelines.training.run_rows import split
from pipelines.training.start_check import check_fits
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, RunError, VLVError, one_line
from vlv_model.squares import Square

if TYPE_CHECKING:
    from torch import nn

    from pipelines.training.loop import Worker


@dataclass(frozen=True)
class TrainingTask:
    """A run as its workers receive it."""

    config: Stage1Config | Stage2Config
    model: ModelConfig
    parent: Path | None  # the run's copy of the checkpoint that it starts from
    files: list[str]  # Parquet files of the images or of their listing, as paths or URLs
    decode: Decode | None = None  # of the images' bytes; default: in the reading thread


def run_on_worker(given: dict[str, Any]) -> None:
    """The function that each Ray Train worker runs.

    `given` has the `task` and two queues that all workers share: `events` (of the metrics) and
    `fatal_errors`.

    Retrying helps after a lost machine, not after a bad row, a bad setting or a full GPU. Ray Train
    restarts the workers after any error, so the second attempt raises the first one's error at once.
    """
    task: TrainingTask = given["task"]
    run_unless_failed(
        task.config.train, given["fatal_errors"], partial(_train_on_worker, task, given["events"])
    )


def run_unless_failed(train: TrainConfig, fatal_errors: Any, work: Callable[[], None]) -> None:
    """Run `work`, or raise the error that an earlier attempt put into the queue `fatal_errors`."""
    import torch

    if not fatal_errors.empty():
        fatal = fatal_errors.get()
        fatal_errors.put(fatal)  # for the other workers
        raise fatal
    try:
        work()
    except VLVError as error:
        fatal_errors.put(type(error)(str(error)))
        raise
    except torch.OutOfMemoryError as error:
        fatal = RunError(f"GPU out of memory ({one_line(error)}): {_memory_advice(train)}")
        fatal_errors.put(fatal)
        raise fatal from error


def _memory_advice(train: TrainConfig) -> str:
    """The settings that would save GPU memory and are not set yet."""
    switches = ("activation_checkpointing", "offload_optimizer")
    advice = [
        f"set train.{name}=true (also to continue this run)"
        for name in switches
        if not getattr(train, name)
    ]
    if (size := train.rows_at_once) > 1:
        advice.append(f"start a new run with train.micro_batch_size below {size}")
    return ", or ".join([*advice, "use larger GPUs"])


def _train_on_worker(task: TrainingTask, events: Any) -> None:
    # Only workers need these imports.
    use_gpu = task.config.train.use_gpu
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import ray.train
    import ray.train.torch
    import torch

    from pipelines.training.loop import Worker

    # Set alike: by default torch uses TF32 for convolutions but not for matrix products.
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = task.config.train.tf32
    if not use_gpu:
        # An optional CPU kernel that takes half a minute to compile on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    context = ray.train.get_context()
    worker = Worker(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device(),
        is_first_on_machine=context.get_local_rank() == 0,
    )
    deepspeed.init_distributed(
        dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
    run_worker(task, worker, events.put, _preempted_nodes)


def _preempted_nodes() -> set[str]:
    """Ids of this run's nodes with a preemption notice (spot); the same set on all ranks."""
    import ray.train

    notice = ray.train.get_preemption_info()
    return set(notice.preempted_node_ids) if notice else set()


def run_worker(
    task: TrainingTask,
    worker: Worker,
    emit: Callable[[dict[str, Any]], None],
    preempted: Callable[[], set[str]],
) -> None:
    """Train in one process of an initialised process group.

    `emit` and `preempted` are those of Trainer.
    """
    from pipelines.training.loop import Trainer
    from pipelines.training.stages import stage1, stage2
    from vlv_model.checkpoints.weights import CheckpointMetadata

    config, model = task.config, task.model
    run_dir = Path(config.run_dir)
    if worker.world_rank == 0:
        checkpointing.remove_unfinished(run_dir)
    latest = _latest_checkpoint(run_dir, worker)
    if (start := latest or task.parent) is not None:
        _verify(start, worker)
    captions: CaptionIndex | None = None
    if isinstance(config, Stage1Config):
        stage = stage1(config, model, start)
    else:
        captions = CaptionIndex.open(run_dir / caption_index.FOLDER)
        draw = partial(captions.draw, seed=config.train.seed, weights=config.data.weights)
        stage = stage2(config, model, start, draw)
    _check_memory(stage.model, config.train, worker)
    index = RowIndex.open([as_path(file) for file in task.files])
    if captions is not None:
        index = index.select(captions.has(index.keys))
    if (initial_keys := run_rows.load_keys(run_dir)) is None:
        initial_keys = index.keys
    index = index.select(np.isin(index.keys, initial_keys))  # rows added since need a new run
    rows, holdout = split(index, config.data.holdout, initial_keys)
    held_out = in_holdout(initial_keys, config.data.holdout)

    def metadata(step: int) -> CheckpointMetadata:
        return CheckpointMetadata(
            stage=stage.name,
            step=step,
            rows_seen=step * config.train.global_batch_size,
            config=dump(config),
            model=model,
            parent=str(task.parent) if task.parent else None,
        )

    trainer = Trainer(
        stage,
        config.train,
        Square.of(model),
        rows,
        holdout,
        (initial_keys[~held_out], initial_keys[held_out]),
        worker,
        emit=emit,
        preempted=preempted,
        metadata=metadata,
        run_dir=run_dir,
        decode=task.decode,
    )
    trainer.setup(latest)
    trainer.train()


def _check_memory(model: nn.Module, train: TrainConfig, worker: Worker) -> None:
    """Raise RunError when the GPU cannot even hold weights, gradients and optimiser."""
    import torch

    from pipelines.training.memory import Parameters, states

    if worker.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(worker.device)
        memory = states(train, Parameters.of(model), worker.world_size)
        check_fits(memory, gpu.total_memory, gpu.name, train, worker.world_size)


def _verify(checkpoint: Path, worker: Worker) -> None:
    """Verify the files' digests, once per machine, since they may be 40 GB.

    Raises CheckpointError on all ranks.
    """
    import torch.distributed as dist

    from vlv_model.checkpoints.files import verify_checkpoint

    errors: list[str | None] = [None] * worker.world_size
    own_error = None
    if worker.is_first_on_machine:
        try:
            verify_checkpoint(checkpoint)
        except (CheckpointError, OSError) as error:  # raised below: the other ranks wait for it
            own_error = str(error)
    if worker.world_size > 1:
        dist.all_gather_object(errors, own_error)
    else:
        errors = [own_error]
    if messages := [message for message in errors if message]:
        raise CheckpointError(messages[0])


def _latest_checkpoint(run_dir: Path, worker: Worker) -> Path | None:
    """The newest finished checkpoint as rank 0 sees it: on a shared disk, others may lag behind."""
    import torch.distributed as dist

    latest = [latest_checkpoint(run_dir)]
    if worker.world_size > 1:
        dist.broadcast_object_list(latest, src=0, device=worker.device)
    return latest[0]
