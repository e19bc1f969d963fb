"""A training job: checks on the driver, Ray Train, and the training loop on the workers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.cli.config import dump
from pipelines.execution.cluster import Cluster
from pipelines.execution.connection import check_resources, ray_session
from pipelines.execution.model import CHECKPOINTS
from pipelines.images.latents import LatentReader
from pipelines.images.random_access import RowIndex
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import read_json_object
from pipelines.training import caption_index, run_folder, run_rows, sample_files, samples
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.metrics import MetricsSink
from pipelines.training.pairs import with_pairs
from pipelines.training.report import FILE as REPORT
from pipelines.training.report import RunReport, count_rows
from pipelines.training.run_captions import captions_of_run
from pipelines.training.run_rows import split
from pipelines.training.skipped_rows import skipped_line
from pipelines.training.start_check import check_before_start, check_images
from pipelines.training.worker import TrainingTask, run_on_worker
from vlv_model.config import ModelConfig
from vlv_model.errors import ConfigError, RunError
from vlv_model.squares import Square


def train(config: Stage1Config | Stage2Config) -> dict[str, Any]:
    """Run a stage, or continue one that was interrupted, to its last step; returns the result.

    The result has `loss_before` and `loss_after` (held-out; None when all held-out rows were removed),
    `steps`, `rows_seen`, `checkpoint` and `columns_read`. Raises DataError, CheckpointError or RunError
    for what the user has to fix.
    """
    if config.ray.in_process:
        raise RunError(
            "ray.address=in-process cannot train, since Ray starts the workers: leave ray.address out "
            "to start Ray for this job, or give the address of a running cluster"
        )
    run = open_run(config)
    config, run_dir = run.config, Path(run.config.run_dir)
    with lock_folder(run_dir, "run_dir"):
        run_folder.claim(run_dir, run.identity)
        rows, held_out = run.rows
        numbers = count_rows(config.data.input, len(rows), len(held_out))
        report = RunReport(config, numbers, len(run.keys) - len(rows) - len(held_out))
        if (run_dir / run_folder.RESULT).is_file():
            print(f"{run_dir} is finished: nothing to train")
            if not (run_dir / REPORT).is_file():  # an earlier version finished the run
                report.write()
            return read_json_object(run_dir / run_folder.RESULT)
        check_before_start(config)
        decoding = config.data.decoding()
        check_images(run.files, rows, decoding, Square.of(run.model))
        run_rows.save_keys(run_dir, run.keys, config.data.input)
        print(f"{len(rows):,} rows to train on, {len(held_out):,} held out", file=sys.stderr)
        parent = run_folder.keep_parent(run_dir, run.checkpoint)
        with ray_session(config.ray) as cluster:
            sampler = _sampler(config, run_dir, run.model, held_out)
            files = [str(file) for file in run.files]
            task = TrainingTask(config, run.model, parent, files, decoding)
            try:
                _fit(cluster, task, sampler, report)
            except Exception as error:
                report.write(failure=error)
                raise
        result = run_folder.write_result(config, run_dir)
        report.write()
        return result


@dataclass(frozen=True)
class OpenedRun:
    """A training run before its models are loaded."""

    config: Stage1Config | Stage2Config
    model: ModelConfig
    checkpoint: Path | None  # the checkpoint it starts from
    files: list[Path]
    rows: tuple[RowIndex, RowIndex]  # training rows, held-out rows
    keys: np.ndarray  # int64 [n], keys of all rows that the run began with
    identity: dict[str, Any]


def open_run(config: Stage1Config | Stage2Config) -> OpenedRun:
    """Check data, models and run folder. Raises what `train` does.

    Writes only the index of captions, and the listing of images that are not in our tables.
    """
    run_dir = Path(config.run_dir)
    if isinstance(config, Stage2Config):
        config = with_pairs(config)
    config = run_folder.with_micro_batch_size(_on_device(config), run_dir)
    recorded = run_folder.recorded(run_dir)
    parts = run_folder.parts_read(config, config.model.find()[0])
    model, checkpoint = config.model.resolve(parts, run_folder.base_models(recorded))
    run_folder.check_start(config, checkpoint)
    if config.data.validation:
        run_folder.check_validation(config.data.validation)
        if model.time_ids == "original" and isinstance(config, Stage1Config):
            raise ConfigError(
                "data.validation has no original sizes: leave it out, or set model.time_ids=square"
            )
    settings = run_folder.settings_identity(config, model, checkpoint, recorded)
    latents, captions = None, None
    if isinstance(config, Stage1Config) and config.data.latents:
        latents = LatentReader(config.data.latents)
    files, stamp = run_folder.list_run_images(config, settings)
    index = RowIndex.open(files)
    if isinstance(config, Stage2Config):
        captions = captions_of_run(config, files, index)
        index = index.select(captions.index.has(index.keys))
    if latents:
        index = _without(latents.failed(), index)
    kept = run_rows.rows_of_run(
        run_dir,
        recorded,
        config.data.input,
        config.data.holdout,
        index,
        stamp,
        config.data.where is not None,
    )
    rows = split(kept.rows, config.data.holdout, kept.keys)
    if latents:
        latents.check(model, np.concatenate([side.keys for side in rows]))
    data = {"rows": [len(side) for side in rows], "keys": [side.digest() for side in rows]}
    identity = settings | data | stamp | kept.identity
    identity |= captions.identity if captions else {}
    run_folder.check_same_run(run_dir, identity)  # before a lock file is written into it
    return OpenedRun(config, model, checkpoint, files, rows, kept.keys, identity)


def _without(failed: np.ndarray, index: RowIndex) -> RowIndex:
    """The rows that precompute could encode."""
    mask = ~np.isin(index.keys, failed)
    if left := len(index) - int(mask.sum()):
        print(
            f"{left:,} images have no latents and are left out: see data.latents", file=sys.stderr
        )
    return index.select(mask)


def _on_device(config: Stage1Config | Stage2Config) -> Stage1Config | Stage2Config:
    """`config` with the default of `train.use_gpu` decided."""
    use_gpu = config.ray.uses_gpu(config.train.use_gpu, "train.use_gpu")
    return config.model_copy(update={"train": config.train.model_copy(update={"use_gpu": use_gpu})})


def show(config: Stage1Config | Stage2Config, result: dict[str, Any]) -> None:
    """Print a result and the folder of the run."""
    before, after = (_format_loss(result[name]) for name in ("loss_before", "loss_after"))
    print(
        f"held-out loss {before} → {after} after "
        f"{result['steps']:,} steps ({result['rows_seen']:,} rows)"
    )
    run_dir = Path(config.run_dir)
    if skipped := skipped_line(run_dir):
        print(skipped)
    print(f"run: {run_dir}")
    print(f"report: {run_dir / REPORT}")
    if pages := sorted((run_dir / sample_files.FOLDER).glob("*.html")):
        print(f"samples: {pages[-1]}")


def _format_loss(loss: float | None) -> str:
    return "none (all held-out rows were removed)" if loss is None else f"{loss:.4f}"


def _fit(
    cluster: Cluster,
    task: TrainingTask,
    sampler: samples.Sampler | None,
    report: RunReport,
) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config, run_dir = task.config, Path(task.config.run_dir)
    train = config.train
    least = train.least_workers
    needed = {"CPU": least * (train.cpus_per_worker + train.readers)} | (
        {"GPU": least} if train.use_gpu else {}
    )
    check_resources(config.ray, cluster, needed, f"train.num_workers={train.num_workers}")
    run_folder.tidy(run_dir, train.keep_checkpoints)
    if not isinstance(train.num_workers, int):
        # Ray counts a lost machine as available for a while: retry with fewer soon (default 60 s).
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    stage = "stage2" if isinstance(config, Stage2Config) else "stage1"
    # On the driver's node, like Ray Train's controller: other nodes may be lost. A restarted queue
    # is empty, which costs only display.
    driver_node = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    options = {"num_cpus": 0, "scheduling_strategy": driver_node, "max_restarts": -1}
    options |= {"max_task_retries": -1}
    events, fatal_errors = Queue(actor_options=options), Queue(actor_options=options)
    trainer = TorchTrainer(
        run_on_worker,
        train_loop_config={
            "task": task,
            "events": events,
            "fatal_errors": fatal_errors,
        },
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            # Resizing costs the steps since the last checkpoint, so not for every new machine.
            elastic_resize_monitor_interval_s=300,
            resources_per_worker={
                "CPU": train.cpus_per_worker,
                **({"GPU": 1} if train.use_gpu else {}),
                **config.ray.pinned(),
            },
        ),
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=str(run_dir),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    with MetricsSink(events, run_dir, stage, dump(config), sampler, report.update):
        trainer.fit()
    for queue in (events, fatal_errors):
        queue.shutdown(force=True)  # a graceful shutdown would be retried forever


def _sampler(
    config: Stage1Config | Stage2Config, run_dir: Path, model: ModelConfig, holdout: RowIndex
) -> samples.Sampler | None:
    train = config.train
    if not train.samples:
        return None
    from pipelines.pictures.squares import Decoding

    validation = config.data.validation
    rows = run_folder.validation_rows(run_dir, validation) if validation else holdout
    if not len(rows):
        return None
    captions, targets, max_tokens = False, None, 0
    if isinstance(config, Stage2Config):
        captions, max_tokens = True, config.train.max_caption_tokens
        targets = None if validation else run_dir / caption_index.FOLDER
    task = samples.Samples(
        run_dir,
        model,
        rows.select(np.arange(len(rows)) < train.samples),
        captions=captions,
        targets=targets,
        max_tokens=max_tokens,
        decoding=Decoding(isolated=True) if validation else config.data.decoding(),
    )
    return samples.Sampler(task, train.steps, bool(train.use_gpu), config.ray.pinned())
