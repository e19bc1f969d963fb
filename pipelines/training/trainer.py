"""A training job from its settings to its result: checks, Ray Train, and what is left behind.

<run_dir>/run.json       what the run is: its settings and the data that it was given
<run_dir>/checkpoints/   see checkpointing
<run_dir>/parent/        the checkpoint that the run started from, so the folder stands alone
<run_dir>/metrics.jsonl  see metrics
<run_dir>/result.json    written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.config import build, dump
from pipelines.images import RowIndex, in_holdout
from pipelines.runtime import check_resources, ray_session
from pipelines.storage import (
    parquet_files,
    refuse_difference,
    refuse_strangers,
    write_atomically,
)
from pipelines.training import checkpointing
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.metrics import MetricsSink, heldout_losses
from vlv_model.config import ModelConfig
from vlv_model.errors import DataError

RESULT = "result.json"

# Settings that may change when a run is continued: they say how it is run, not what it computes.
FREE = ("ray", "run_dir", "train.wandb", "train.max_failures", "train.keep_checkpoints",
        "train.checkpoint_every", "train.prefetch", "train.cpus_per_worker")  # fmt: skip


def train(config: Stage1Config | Stage2Config) -> dict[str, Any]:
    """Run a stage to its end, or continue it where it was killed; returns its result.

    The result holds `loss_before` and `loss_after` (held-out), `steps`, `rows_seen`,
    `checkpoint`. Raises DataError, CheckpointError, RunError for what the user has to mend.
    """
    run_dir = Path(config.run_dir)
    model, checkpoint = config.model.resolve()
    files = parquet_files(config.data.input)
    columns = [config.data.caption_column] if isinstance(config, Stage2Config) else []
    train_rows, holdout_rows = split(RowIndex.open(files, columns), config.data.holdout)
    identity = _identity(config, model, checkpoint, [train_rows, holdout_rows])
    _claim(run_dir, identity)
    if (run_dir / RESULT).is_file():
        print(f"{run_dir} is finished: nothing to train")
        return json.loads((run_dir / RESULT).read_text())
    parent = _keep_parent(run_dir, checkpoint)
    with ray_session(config.ray):
        _fit(config, run_dir, model, parent, [str(file) for file in files])
    losses = heldout_losses(run_dir)
    last = checkpointing.latest_checkpoint(run_dir)
    if last is None or not losses:
        raise RuntimeError(f"training of {run_dir} ended without a checkpoint or an evaluation")
    result = {
        "loss_before": losses[0][1],
        "loss_after": losses[-1][1],
        "steps": config.train.steps,
        "rows_seen": config.train.steps * config.train.global_batch_size,
        "checkpoint": str(last.relative_to(run_dir)),
    }
    write_atomically(run_dir / RESULT, json.dumps(result, indent=2))
    return result


def show(config: Stage1Config | Stage2Config, result: dict[str, Any]) -> None:
    """Print a result's figures and where the run lies."""
    print(
        f"held-out loss {result['loss_before']:.4f} → {result['loss_after']:.4f} after "
        f"{result['steps']:,} steps ({result['rows_seen']:,} rows)"
    )
    print(f"run: {config.run_dir}")


def split(index: RowIndex, holdout: float) -> tuple[RowIndex, RowIndex]:
    """(training rows, held-out rows); neither may be empty."""
    mask = in_holdout(index.keys, holdout)
    if mask.all() or not mask.any():
        side = "training" if mask.all() else "held-out"
        raise DataError(
            f"of {len(index)} usable rows none is a {side} row at data.holdout={holdout}: "
            "give more rows or another share"
        )
    return index.select(~mask), index.select(mask)


def _fit(
    config: Stage1Config | Stage2Config,
    run_dir: Path,
    model: ModelConfig,
    parent: Path | None,
    files: list[str],
) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    train = config.train
    needed = {"CPU": train.num_workers * train.cpus_per_worker}
    needed |= {"GPU": train.num_workers} if train.use_gpu else {}
    check_resources(config.ray, needed, f"train.num_workers={train.num_workers}")
    _tidy(run_dir, train.keep_checkpoints)
    last = checkpointing.latest_checkpoint(run_dir)
    stage = "stage2" if isinstance(config, Stage2Config) else "stage1"
    events = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "stage": stage,
            "config": dump(config),
            "model": model.model_dump(),
            "parent": str(parent) if parent else None,
            "checkpoint": str(last) if last else None,
            "files": files,
            "events": events,
        },
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker={
                "CPU": train.cpus_per_worker,
                **({"GPU": 1} if train.use_gpu else {}),
            },
        ),
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        run_config=RunConfig(
            name=checkpointing.FOLDER,
            storage_path=str(run_dir),
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
        ),
    )
    with MetricsSink(events, run_dir, stage, train.steps, dump(config), train.wandb):
        trainer.fit()
    events.shutdown()


def _worker(loop: dict[str, Any]) -> None:
    """What each worker of Ray Train runs; imports are here, since only workers need them."""
    use_gpu = loop["config"]["train"]["use_gpu"]
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import ray.train
    import ray.train.torch

    from pipelines.training.loop import Trainer, Worker
    from pipelines.training.stages import stage1, stage2
    from vlv_model.checkpoint import CheckpointMetadata

    if not use_gpu:
        # An optional kernel for CPUs whose compilation takes half a minute on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    context = ray.train.get_context()
    worker = Worker(
        context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    )
    deepspeed.init_distributed(
        dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
    model = ModelConfig(**loop["model"])
    parent = Path(loop["parent"]) if loop["parent"] else None
    config: Stage1Config | Stage2Config
    if loop["stage"] == "stage1":
        config = build(Stage1Config, loop["config"])
        stage = stage1(config, model, parent)
    else:
        config = build(Stage2Config, loop["config"])
        stage = stage2(config, model, parent)
    index = RowIndex.open([Path(file) for file in loop["files"]], stage.columns)
    rows, holdout = split(index, config.data.holdout)

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
        model.image_size,
        rows,
        holdout,
        worker,
        emit=loop["events"].put,
        metadata=metadata,
        checkpoints=Path(config.run_dir) / checkpointing.FOLDER,
    )
    trainer.start(_resume_from(loop["checkpoint"]))
    trainer.run()


def _resume_from(given: str | None) -> Path | None:
    """The newest checkpoint: of this fit, after a worker was lost, else of an earlier one."""
    import ray.train

    reported = ray.train.get_checkpoint()
    if reported is not None:
        return Path(reported.path)
    return Path(given) if given else None


def _tidy(run_dir: Path, keep: int) -> None:
    """Before a fit: drop unfinished and surplus checkpoints, and Ray Train's notes on them.

    Ray Train's snapshot is not written atomically and refers to checkpoints by name; we find the
    newest finished one ourselves, so each fit starts with clean notes.
    """
    folder = run_dir / checkpointing.FOLDER
    kept = list(checkpointing.finished_checkpoints(run_dir))[:keep]
    for other in folder.glob("step-*"):
        if other not in kept:
            shutil.rmtree(other)
    for snapshot in folder.glob("checkpoint_manager_snapshot*"):
        snapshot.unlink()


def _keep_parent(run_dir: Path, checkpoint: Path | None) -> Path | None:
    """Copy the checkpoint that the run starts from into its folder, once; returns the copy."""
    if checkpoint is None:
        return None
    kept = run_dir / "parent"
    if not kept.is_dir():
        temporary = run_dir / ".parent"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name in ("model.safetensors", "checkpoint.json"):
            shutil.copy2(checkpoint / name, temporary / name)
        temporary.rename(kept)
    return kept


def _claim(run_dir: Path, identity: dict[str, Any]) -> None:
    """Make the folder this run's, or refuse one that holds another run or something else."""
    file = run_dir / "run.json"
    if file.is_file():
        refuse_difference(run_dir, json.loads(file.read_text()), identity, "run_dir")
        return
    refuse_strangers(run_dir, ("pairs",), "run", "run_dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(identity, indent=2))


def _identity(
    config: Stage1Config | Stage2Config,
    model: ModelConfig,
    checkpoint: Path | None,
    indexes: list[RowIndex],
) -> dict[str, Any]:
    """All that decides what the run computes, flat, so that a difference can be named."""
    values = {**dump(config), "model": model.model_dump()}
    flat = {k: v for k, v in _flatten(values) if not k.startswith(FREE)}
    flat["rows"] = [len(index) for index in indexes]
    flat["keys"] = [index.digest() for index in indexes]
    if checkpoint is not None:
        digest = hashlib.sha256((checkpoint / "checkpoint.json").read_bytes()).hexdigest()
        flat["parent"] = digest[:16]
    return flat


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, value))
    return flat
