"""The one training loop. A stage brings its model and its batches; everything else is here."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from pipelines.images import RowIndex, RowReader
from pipelines.training.checkpointing import (
    checkpoint_name,
    gathered_weights,
    load_optimizer,
    save_optimizer,
    step_of,
)
from pipelines.training.config import TrainConfig
from pipelines.training.data import Batch, GlobalOrder, StepReader, mix
from pipelines.training.deepspeed_config import deepspeed_config
from pipelines.training.schedule import learning_rate
from pipelines.training.stages import Prepared, Stage
from vlv_model.checkpoint import CheckpointMetadata, save_checkpoint
from vlv_model.errors import VLVError


class NonFiniteLoss(VLVError):
    """The loss is not a number; raised before the update that it would have spoilt."""


@dataclass(frozen=True)
class Worker:
    """This process among the others."""

    world_rank: int
    world_size: int
    device: torch.device


class Trainer:
    """Runs `train.steps` updates of a stage, evaluates, and saves; one instance per worker.

    `emit` takes a dictionary for each thing that the driver shows or logs (rank 0 only).
    `metadata(step)` is what a checkpoint says about itself; `checkpoints` is where Ray Train puts it.
    """

    def __init__(
        self,
        stage: Stage,
        train: TrainConfig,
        image_size: int,
        rows: RowIndex,
        holdout: RowIndex,
        worker: Worker,
        emit: Callable[[dict[str, Any]], None],
        metadata: Callable[[int], CheckpointMetadata],
        checkpoints: Path,
    ) -> None:
        self.stage = stage
        self.train_config = train
        self.image_size = image_size
        self.holdout = RowReader(holdout, stage.columns)
        self.worker = worker
        self.emit = emit if worker.world_rank == 0 else lambda event: None
        self.metadata = metadata
        self.checkpoints = checkpoints
        self.step = 0
        order = GlobalOrder(len(rows), train.seed)
        self.rows = RowReader(rows, stage.columns)
        read = partial(self._read, self.rows)
        self.reader = StepReader(order, read, train, worker.world_rank)

    def start(self, checkpoint: Path | None) -> None:
        """Put the model under DeepSpeed and, after an interruption, take up its optimiser's state.

        The model was opened from `checkpoint` already.
        """
        import deepspeed

        self.stage.model.to(self.worker.device)
        train = self.train_config
        groups = self.stage.parameter_groups(train.pretrained_rate)
        optimizer = torch.optim.AdamW(
            groups, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.stage.model,
            optimizer=optimizer,
            model_parameters=groups,
            config=deepspeed_config(train),
            dist_init_required=False,
        )
        if checkpoint is not None:
            self.step = step_of(checkpoint)
            load_optimizer(self.engine, checkpoint, self.worker.world_size)
        self.emit({"event": "start", "step": self.step})

    def run(self) -> None:
        """All updates that are left, with an evaluation before the first and after the last."""
        train = self.train_config
        if self.step in (0, train.steps):  # the latter: killed between the last save and its end
            self.evaluate()
        waiting = time.perf_counter()
        for step, batches in self.reader.steps(self.step):
            data_seconds = time.perf_counter() - waiting
            loss, grad_norm = self.update(step, batches)
            self.step = step + 1
            self.emit(
                {
                    "event": "step",
                    "step": self.step,
                    "loss": loss,
                    "learning_rate": learning_rate(train, step),
                    "grad_norm": grad_norm,
                    "images_per_second": train.global_batch_size / (time.perf_counter() - waiting),
                    "data_seconds": data_seconds,
                }
            )
            last = self.step == train.steps
            if self.step % train.eval_every == 0 or last:
                self.evaluate()
            if self.step % train.checkpoint_every == 0 or last:
                self.save()
            waiting = time.perf_counter()

    def update(self, step: int, batches: list[Prepared]) -> tuple[float, float | None]:
        """One optimiser update; returns the global batch's loss and the gradient's norm.

        The loss is a mean over the *global* batch: each micro-batch's mean counts by its share of
        all images or label tokens, which differ between workers in stage 2.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * learning_rate(self.train_config, step)
        # Dropout depends on the step and the rank alone, so a resumed run repeats it.
        torch.manual_seed(mix(self.train_config.seed, step, self.worker.world_rank) >> 1)
        self.engine.train()
        total_weight = self._sum_over_workers(float(sum(batch.weight for batch in batches)))
        # DeepSpeed takes the mean over workers and accumulated micro-batches: undo that mean.
        parts = self.worker.world_size * len(batches)
        loss = 0.0
        for number, batch in enumerate(batches):
            mean = self.engine(**self._to_device(batch))
            share = mean * (batch.weight / total_weight)
            self.engine.backward(share * parts)
            loss += share.item()
            if number == len(batches) - 1:
                loss = self._sum_over_workers(loss)
                self._refuse_non_finite(loss, step, batches)
            self.engine.step()
        norm = self.engine.get_global_grad_norm()  # None without ZeRO
        if norm is not None and not math.isfinite(norm):
            raise NonFiniteLoss(
                f"the gradient of step {step + 1} is not finite: lower train.learning_rate; the "
                "last checkpoint is from before it"
            )
        return loss, None if norm is None else float(norm)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss on the held-out rows, shared out over all workers; the same draws every time."""
        train, rank, size = self.train_config, self.worker.world_rank, self.worker.world_size
        count = min(train.eval_rows, len(self.holdout.index))
        mine = range(rank, count, size)
        # Under ZeRO-3 every forward gathers weights from all: all must make equally many.
        rounds = math.ceil(math.ceil(count / size) / train.rows_at_once)
        self.engine.eval()
        total = weight = 0.0
        for i in range(rounds):
            positions = list(mine[i * train.rows_at_once : (i + 1) * train.rows_at_once])
            rows = [(-1, position) for position in positions or [0]]
            batch = self._read(self.holdout, rows)
            loss = self.engine(**self._to_device(batch)).item()
            if positions:
                total += loss * batch.weight
                weight += batch.weight
        loss = self._sum_over_workers(total) / self._sum_over_workers(weight)
        event = {"event": "eval", "step": self.step, "heldout_loss": loss, "rows": count}
        self.emit({**event, "columns_read": self.rows.columns_read})

    def save(self) -> None:
        """Report a checkpoint to Ray Train, which stores it in the run folder."""
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
            folder = Path(temporary) / checkpoint_name(self.step)
            writes = self.worker.world_rank == 0
            weights = gathered_weights(self.stage.model, keep=writes)
            if writes:
                home = self.checkpoints / checkpoint_name(self.step)
                save_checkpoint(folder, self.stage.model, self.metadata(self.step), home, weights)
            save_optimizer(self.engine, folder, self.worker.world_rank, self.worker.world_size)
            ray.train.report(
                {"step": self.step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=checkpoint_name(self.step),
            )
        self.emit({"event": "checkpoint", "step": self.step})

    def _read(self, reader: RowReader, rows: Sequence[tuple[int, int]]) -> Prepared:
        return self.stage.prepare(Batch.read(reader, rows, self.image_size))

    def _to_device(self, batch: Prepared) -> dict[str, torch.Tensor]:
        return {name: value.to(self.worker.device) for name, value in batch.inputs.items()}

    def _sum_over_workers(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.worker.device)
        if self.worker.world_size > 1:
            dist.all_reduce(total)
        return total.item()

    def _refuse_non_finite(self, loss: float, step: int, batches: list[Prepared]) -> None:
        if math.isfinite(loss):
            return
        keys = [key for batch in batches for key in batch.keys]
        raise NonFiniteLoss(
            f"the loss of step {step + 1} is {loss}; worker {self.worker.world_rank} had the rows "
            f"{keys[:8]}{'…' if len(keys) > 8 else ''}: lower train.learning_rate or look at them"
        )
