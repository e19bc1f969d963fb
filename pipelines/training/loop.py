"""The one training loop. A stage brings its model and its batches; everything else is here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.execution import checkpoints
from pipelines.images.random_access import RowIndex, RowReader
from pipelines.training import checkpointing
from pipelines.training.config import TrainConfig
from pipelines.training.data import GlobalOrder, StepReader, keys_digest, mix
from pipelines.training.engine import clip_gradients, start_engine
from pipelines.training.kept_rows import positions
from pipelines.training.metrics import MetricsLog
from pipelines.training.optimizer_state import gather_moments, gather_weights
from pipelines.training.reading import Actors, Reading, Threads
from pipelines.training.saver import Saver
from pipelines.training.schedule import learning_rate
from pipelines.training.stages import Prepared, Stage
from pipelines.training.usage import Utilisation, memory_gb
from vlv_model.checkpoints.weights import CheckpointMetadata
from vlv_model.errors import VLVError
from vlv_model.squares import Square

LISTED = 64  # rows in an error message


class NonFiniteLoss(VLVError):
    """Loss or gradient is not a number; raised before the update that it would have spoilt."""


@dataclass(frozen=True)
class Worker:
    """This process among the others."""

    world_rank: int
    world_size: int
    device: torch.device
    is_first_of_machine: bool


class Trainer:
    """Runs `train.steps` updates of a stage, evaluates, and saves; one instance per worker.

    `rows` and `holdout` are those that are left of the ones whose keys, int64 `[n]` ascending, the run
    `began` with. `emit` takes a dictionary for each thing that the driver shows (rank 0 only).
    `called_back` tells, on all ranks alike, the machines that will soon be gone: their notice is
    answered with a checkpoint. `metadata(step)` is what a checkpoint says about itself.
    """

    def __init__(
        self,
        stage: Stage,
        train: TrainConfig,
        square: Square,
        rows: RowIndex,
        holdout: RowIndex,
        began: tuple[np.ndarray, np.ndarray],
        worker: Worker,
        emit: Callable[[dict[str, Any]], None],
        called_back: Callable[[], set[str]],
        metadata: Callable[[int], CheckpointMetadata],
        run_dir: Path,
    ) -> None:
        self.stage = stage
        self.train_config = train
        self.worker = worker
        self.emit = emit
        self.called_back = called_back
        self.leaving: set[str] = set()
        self.log = MetricsLog(run_dir)
        self.saver = Saver()
        self.utilisation: Utilisation | None = None
        self.metadata = metadata
        self.run_dir = run_dir
        self.step = 0
        self.order = GlobalOrder(len(began[0]), train.seed, positions(began[0], rows))
        readers = [RowReader(index, stage.columns) for index in (rows, holdout)]
        self.columns_read = readers[0].columns_read
        # Those that are left of the evaluated rows; if none is, the first held-out row, if any.
        window = positions(began[1], holdout)[: train.eval_rows]
        self.heldout_rows: list[int] = window[window >= 0].tolist() or [0][: len(holdout)]
        threads = [Threads(reader, square, train.cpus_per_worker) for reader in readers]
        self.heldout: Reading = threads[1]
        self.rows: Reading = threads[0]
        if train.readers:
            self.rows = Actors(rows, stage.columns, square, train.readers)
        begin = partial(self._begin, self.rows)
        self.reader = StepReader(self.order, begin, train, worker.world_rank, worker.world_size)

    def start(self, checkpoint: Path | None) -> None:
        """Put the model under DeepSpeed and, after an interruption, take up its optimiser's state.

        The model was opened from `checkpoint` already.
        """
        parameters = sum(parameter.numel() for parameter in self.stage.model.parameters())
        self.stage.model.to(self.worker.device)
        if self.worker.world_rank == 0 and self.worker.device.type == "cuda":  # a guess on CPUs
            batch = self.reader.read(self.step)[0][1]
            self.utilisation = Utilisation.measure(self.stage, batch, self.worker.device)
        if self.train_config.activation_checkpointing:
            self.stage.checkpoint_activations()
        if self.train_config.compile:
            self.stage.compile(self.worker.device)
        self.engine = start_engine(self.stage, self.train_config, self.worker.world_size)
        if checkpoint is not None:
            self.step = checkpoints.step_of(checkpoint)
            checkpointing.load_optimizer(self.engine, checkpoint)
        if self.worker.world_rank == 0:
            self.log.begin(self.step)
            self.emit({"event": "start", "step": self.step, "parameters": parameters})

    def run(self) -> None:
        """All updates that are left, with an evaluation before the first and after the last."""
        train = self.train_config
        if self.step == 0:
            self.evaluate()
        waiting = time.perf_counter()
        for step, batches in self.reader.steps(self.step):
            waited = time.perf_counter() - waiting
            loss, grad_norm, weight = self.update(step, batches)
            seconds, images = time.perf_counter() - waiting, self.reader.rows_of(step)
            self.step = step + 1
            event = {
                "event": "step",
                "step": self.step,
                "keys": self._digest_of_keys(batches),
                "loss": loss,
                "learning_rate": learning_rate(train, step),
                "grad_norm": grad_norm,
                "seconds": seconds,
                "images_per_second": images / seconds,
                **self._waiting(waited, seconds),
                "memory_gb": memory_gb(self.worker.device),
            }
            if self.utilisation:
                size = self.worker.world_size
                event["mfu"] = self.utilisation.of(images, weight, seconds, size)
            self._tell(event)
            last = self.step == train.steps
            if self.step % train.eval_every == 0 or last:
                self.evaluate()
            leaving = self.called_back()
            if self.step % train.checkpoint_every == 0 or last or leaving - self.leaving:
                self.save()
            if leaving - self.leaving:
                self.saver.wait()  # there may be no next step
            self.leaving |= leaving
            waiting = time.perf_counter()
        for reading in (self.rows, self.heldout):
            reading.close()
        self.saver.wait()

    def update(self, step: int, batches: list[tuple[int, Prepared]]) -> tuple[float, float, float]:
        """One optimiser update; returns the global batch's loss, gradient norm and weight.

        `batches` are this worker's micro-batches with their numbers in the step. The loss is a
        mean over the *global* batch: each micro-batch's mean counts by its share of all images or
        label tokens, which differ between workers in stage 2.
        """
        train = self.train_config
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["share"] * learning_rate(train, step)
        self.engine.train()
        total_weight = self._sum_over_workers(float(sum(batch.weight for _, batch in batches)))
        total_weight = total_weight or 1.0  # of a step whose rows were all taken down
        # All workers pass equally often; where the last has nothing left, its share is nothing.
        rounds = train.accumulation(self.worker.world_size)
        passes = [(number, batch, batch.weight / total_weight) for number, batch in batches]
        passes += [(*batches[-1], 0.0)] * (rounds - len(batches))
        # DeepSpeed takes the mean over workers and accumulated micro-batches: undo that mean.
        parts = self.worker.world_size * rounds
        losses: list[Tensor] = []
        for turn, (number, batch, share) in enumerate(passes):
            # Dropout belongs to the micro-batch, so another number of workers repeats it.
            torch.manual_seed(mix(train.seed, step, number) >> 1)
            mean = self.engine(**self._to_device(batch))
            self.engine.backward(mean * (share * parts))
            # Nothing waits for the device before the last pass.
            losses.append(mean.detach().double() * share)
            if turn == rounds - 1:
                loss = self._sum_over_workers(sum(losses))
                self._refuse_non_finite(loss, step, batches, losses)
                if not train.zero_stage:
                    norm = self._finite(clip_gradients(self.engine, train.max_grad_norm), step)
            self.engine.step()
        if train.zero_stage:  # which leaves out an update whose gradient is not finite
            norm = self._finite(float(self.engine.get_global_grad_norm()), step)
        return loss, norm, total_weight

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss on the held-out rows, shared out over all workers; the same draws every time.

        None where these rows were all taken down since the run began.
        """
        train, rank, size = self.train_config, self.worker.world_rank, self.worker.world_size
        count = len(self.heldout_rows)
        mine = self.heldout_rows[rank::size]
        # Under ZeRO-3 every forward gathers weights from all: all must make equally many.
        rounds = math.ceil(math.ceil(count / size) / train.rows_at_once)
        self.engine.eval()
        total = weight = 0.0
        for i in range(rounds):
            here = mine[i * train.rows_at_once : (i + 1) * train.rows_at_once]
            rows = [(-1, position) for position in here or [0]]
            batch = self._begin(self.heldout, rows)()
            loss = self.engine(**self._to_device(batch)).item()
            if here:
                total += loss * batch.weight
                weight += batch.weight
        total, weight = self._sum_over_workers(total), self._sum_over_workers(weight)
        loss = total / weight if count else None
        event = {"event": "eval", "step": self.step, "heldout_loss": loss, "rows": count}
        self._tell({**event, "columns_read": self.columns_read})

    def save(self) -> None:
        """Gather weights and optimiser from all workers; they are written while training goes on."""
        self.saver.wait()  # so that there is one copy in memory, not two
        writes = self.worker.world_rank == 0
        weights = gather_weights(self.engine, keep=writes)
        moments = gather_moments(self.engine, keep=writes)
        if writes:
            self.saver.submit(partial(self._write, self.metadata(self.step), weights, moments))

    def _write(
        self, about: CheckpointMetadata, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        """In the saver's thread: it reads shapes of the model, and no weight."""
        self.log.sync()
        keep = self.train_config.keep_checkpoints
        checkpointing.save(self.run_dir, self.stage.model, about, weights, moments, keep)
        self._tell({"event": "checkpoint", "step": about.step})

    def _tell(self, event: dict[str, Any]) -> None:
        if self.worker.world_rank == 0:
            self.log.append(event)
            self.emit(event)

    def _digest_of_keys(self, batches: list[tuple[int, Prepared]]) -> str:
        """Which rows all workers used in a step: `keys_digest` as hex."""
        mine = keys_digest([key for _, batch in batches for key in batch.keys])
        digest = torch.tensor(np.uint64(mine).astype(np.int64), device=self.worker.device)
        if self.worker.world_size > 1:
            dist.all_reduce(digest)  # wraps around, as the digest does
        return f"{digest.item() % 2**64:016x}"

    def _waiting(self, waited: float, seconds: float) -> dict[str, float]:
        """The most that a worker waited for its rows, for the others wait for that one in the update."""
        most = torch.tensor(waited, dtype=torch.float64, device=self.worker.device)
        if self.worker.world_size > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        waited = min(most.item(), seconds)
        return {"data_seconds": waited, "data_share": waited / seconds}

    def _begin(self, reading: Reading, rows: Sequence[tuple[int, int]]) -> Callable[[], Prepared]:
        finish = reading.begin(rows)
        return lambda: self._pinned(self.stage.prepare(finish()))

    def _pinned(self, batch: Prepared) -> Prepared:
        """In memory that a GPU copies from by itself; made so in the thread that reads ahead."""
        if self.worker.device.type != "cuda":
            return batch
        return replace(batch, inputs={n: value.pin_memory() for n, value in batch.inputs.items()})

    def _to_device(self, batch: Prepared) -> dict[str, Tensor]:
        device = self.worker.device
        return {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}

    def _sum_over_workers(self, value: float | Tensor) -> float:
        total = torch.as_tensor(value, dtype=torch.float64, device=self.worker.device)
        if self.worker.world_size > 1:
            dist.all_reduce(total)
        return total.item()

    def _refuse_non_finite(
        self, loss: float, step: int, batches: list[tuple[int, Prepared]], losses: list[Tensor]
    ) -> None:
        """Stop all workers, naming the rows of the micro-batches that are to blame, on any of them."""
        if math.isfinite(loss):
            return
        pairs = zip(batches, losses, strict=False)  # without an empty last one
        mine = [key for (_, batch), part in pairs if not part.isfinite() for key in batch.keys]
        found: list[list[int]] = [[]] * self.worker.world_size
        if self.worker.world_size > 1:
            dist.all_gather_object(found, mine)
        else:
            found = [mine]
        keys = sorted(key for several in found for key in several)
        raise NonFiniteLoss(
            f"the loss of step {step + 1} is {loss}; it comes from the {len(keys)} rows "
            f"{', '.join(map(str, keys[:LISTED]))}{', …' if len(keys) > LISTED else ''}: lower "
            "train.learning_rate or look at them"
        )

    def _finite(self, norm: float, step: int) -> float:
        if not math.isfinite(norm):
            raise NonFiniteLoss(
                f"the gradient of step {step + 1} is not finite: lower train.learning_rate"
            )
        return norm
