"""The training loop of both stages; a stage supplies its model and its inputs."""

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

from pipelines.execution.model import step_of
from pipelines.images.random_access import Decode, RowIndex, RowReader
from pipelines.report.versions import versions
from pipelines.training import checkpointing
from pipelines.training.config import TrainConfig
from pipelines.training.data import NO_ROW, GlobalOrder, StepReader, keys_digest
from pipelines.training.engine import clip_gradients, learning_rate, start_engine
from pipelines.training.metrics import MetricsLog
from pipelines.training.optimizer_state import gather_moments, gather_weights
from pipelines.training.reading import BatchReader, ReaderActors, ReaderThreads
from pipelines.training.run_rows import positions
from pipelines.training.skipped_rows import HELD_OUT, SkippedRows
from pipelines.training.stages import MicroBatch, Stage
from pipelines.training.usage import Utilisation, device_name, memory_gb
from vlv_model.checkpoints.weights import CheckpointMetadata
from vlv_model.errors import VLVError
from vlv_model.seeds import mix
from vlv_model.squares import Square

MAX_LISTED_KEYS = 64  # in an error message


class NonFiniteLoss(VLVError):
    """The loss or the gradient is NaN or infinite; raised before the optimiser's update."""


@dataclass(frozen=True)
class Worker:
    """The ranks and the device of this process."""

    world_rank: int
    world_size: int
    device: torch.device
    is_first_on_machine: bool


class Trainer:
    """Trains a stage for `train.steps` steps, evaluates and saves; one instance per worker.

    `initial_keys` are the keys, int64 `[n]` ascending, of the training and the held-out rows that the
    run began with; `rows` and `holdout` index those that still exist. `emit` sends an event to the
    driver (rank 0 only). `preempted` returns the ids of nodes with a preemption notice, the same on all
    ranks; a new notice causes a checkpoint. `metadata(step)` returns a checkpoint's metadata.
    """

    def __init__(
        self,
        stage: Stage,
        train: TrainConfig,
        square: Square,
        rows: RowIndex,
        holdout: RowIndex,
        initial_keys: tuple[np.ndarray, np.ndarray],
        worker: Worker,
        emit: Callable[[dict[str, Any]], None],
        preempted: Callable[[], set[str]],
        metadata: Callable[[int], CheckpointMetadata],
        run_dir: Path,
        decode: Decode | None = None,
    ) -> None:
        self.stage = stage
        self.train_config = train
        self.worker = worker
        self.emit = emit
        self.preempted = preempted
        self.saved_for: set[str] = set()  # preempted nodes for which a checkpoint was saved
        self.log = MetricsLog(run_dir)
        self.saver = checkpointing.Saver()
        self.utilisation: Utilisation | None = None
        self.metadata = metadata
        self.run_dir = run_dir
        self.step = 0
        train_keys, heldout_keys = initial_keys
        self.order = GlobalOrder(len(train_keys), train.seed, positions(train_keys, rows))
        self.skipped = SkippedRows(run_dir, worker.world_rank)
        readers = [RowReader(index, decode=decode) for index in (rows, holdout)]
        self.columns_read = readers[0].columns_read
        # If none of the evaluated rows remains: the first held-out row, if any.
        window = positions(heldout_keys, holdout)[: train.eval_rows]
        self.heldout_rows: list[int] = window[window >= 0].tolist() or [0][: len(holdout)]
        threads = [ReaderThreads(reader, square, train.cpus_per_worker) for reader in readers]
        self.heldout: BatchReader = threads[1]
        self.rows: BatchReader = threads[0]
        if train.readers:
            self.rows = ReaderActors(rows, square, train.readers, decode)
        self.holdout = holdout
        begin = partial(self._begin, self.rows, rows)
        self.reader = StepReader(self.order, begin, train, worker.world_rank, worker.world_size)

    def setup(self, checkpoint: Path | None) -> None:
        """Wrap the model in DeepSpeed and, to resume, load the optimiser's state of `checkpoint`.

        The model's weights are already those of `checkpoint`.
        """
        parameters = sum(parameter.numel() for parameter in self.stage.model.parameters())
        self.stage.model.to(self.worker.device)
        if self.worker.world_rank == 0 and self.worker.device.type == "cuda":  # no MFU on CPUs
            batch = self.reader.read(self.step)[0][1]
            self.utilisation = Utilisation.measure(self.stage, batch, self.worker.device)
        if self.train_config.activation_checkpointing:
            self.stage.checkpoint_activations()
        if self.train_config.compile:
            self.stage.compile(self.worker.device)
        self.engine = start_engine(self.stage, self.train_config, self.worker.world_size)
        if checkpoint is not None:
            self.step = step_of(checkpoint)
            checkpointing.load_optimizer(self.engine, checkpoint)
        if self.worker.world_rank == 0:
            repeated = self.log.begin(self.step)
            start = {"event": "start", "step": self.step, "parameters": parameters}
            start |= {"time": time.time(), "repeated": repeated, "workers": self.worker.world_size}
            self._report(
                start | {"device": device_name(self.worker.device), "versions": versions()}
            )

    def train(self) -> None:
        """Run the remaining steps; evaluates before the first step and after the last."""
        train = self.train_config
        if self.step == 0:
            self.evaluate()
        start = time.perf_counter()
        for step, batches in self.reader.steps(self.step):
            data_seconds = time.perf_counter() - start
            loss, grad_norm, global_valid_tokens = self.train_step(step, batches)
            seconds, images = time.perf_counter() - start, self.reader.rows_of(step)
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
                **self._data_wait(data_seconds, seconds),
                "memory_gb": memory_gb(self.worker.device),
            }
            if self.utilisation:
                event["mfu"] = self.utilisation.mfu(
                    images, global_valid_tokens, seconds, self.worker.world_size
                )
            self._report(event)
            last = self.step == train.steps
            if self.step % train.eval_every == 0 or last:
                self.evaluate()
            newly_preempted = self.preempted() - self.saved_for
            if self.step % train.checkpoint_every == 0 or last or newly_preempted:
                self.save()
            if newly_preempted:
                self.saver.wait()  # this worker may not reach the next step
            self.saved_for |= newly_preempted
            start = time.perf_counter()
        for reader in (self.rows, self.heldout):
            reader.close()
        self.saver.wait()

    def train_step(
        self, step: int, batches: list[tuple[int, MicroBatch]]
    ) -> tuple[float, float, float]:
        """One optimiser update; returns the loss, the gradient norm and `global_valid_tokens`.

        `batches` are this worker's micro-batches with their numbers in the step. The loss is the mean
        over the valid tokens of the *global* batch, so each micro-batch's mean is weighted by its share
        of them.
        """
        train = self.train_config
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["share"] * learning_rate(train, step)
        self.engine.train()
        local_valid_tokens = sum(batch.valid_tokens for _, batch in batches)
        global_valid_tokens = self._sum_over_workers(float(local_valid_tokens))
        global_valid_tokens = global_valid_tokens or 1.0  # all rows of the step were removed
        # All workers need the same number of passes: pad with passes of share 0.
        rounds = train.accumulation(self.worker.world_size)
        passes = [
            (number, batch, batch.valid_tokens / global_valid_tokens) for number, batch in batches
        ]
        passes += [(*batches[-1], 0.0)] * (rounds - len(batches))
        # DeepSpeed takes the mean over workers and accumulated micro-batches: undo that mean.
        parts = self.worker.world_size * rounds
        losses: list[Tensor] = []
        for turn, (number, batch, share) in enumerate(passes):
            # Dropout is seeded per micro-batch, so it does not depend on the number of workers.
            torch.manual_seed(mix(train.seed, step, number) >> 1)
            mean = self.engine(**self._to_device(batch))
            self.engine.backward(mean * (share * parts))
            # Not read before the last pass, so as not to synchronise with the device.
            losses.append(mean.detach().double() * share)
            if turn == rounds - 1:
                loss = self._sum_over_workers(sum(losses))
                self._check_loss(loss, step, batches, losses)
                if not train.zero_stage:
                    norm = _check_norm(clip_gradients(self.engine, train.max_grad_norm), step)
            self.engine.step()
        if train.zero_stage:  # ZeRO has skipped the update if the gradient is not finite
            norm = _check_norm(float(self.engine.get_global_grad_norm()), step)
        return loss, norm, global_valid_tokens

    @torch.no_grad()
    def evaluate(self) -> None:
        """Report the loss on the held-out rows, which are split over the workers.

        Noise and timesteps are the same in every evaluation. The loss is None when all held-out rows
        were removed, or have no image that can be used.
        """
        train, rank, size = self.train_config, self.worker.world_rank, self.worker.world_size
        count = len(self.heldout_rows)
        mine = self.heldout_rows[rank::size]
        # Under ZeRO-3 a forward pass gathers weights from all workers: all need as many passes.
        rounds = math.ceil(math.ceil(count / size) / train.rows_at_once)
        self.engine.eval()
        total = valid_tokens = used = 0.0
        for i in range(rounds):
            evaluated = mine[i * train.rows_at_once : (i + 1) * train.rows_at_once]
            batch: MicroBatch | Any = NO_ROW
            if evaluated:
                rows = [(HELD_OUT, position) for position in evaluated]
                batch = self._begin(self.heldout, self.holdout, rows)()
            if batch is NO_ROW:
                batch = self.reader.without_rows()
            loss = self.engine(**self._to_device(batch)).item()
            total += loss * batch.valid_tokens
            valid_tokens += batch.valid_tokens
            used += len(batch.keys)
        total, valid_tokens, used = map(self._sum_over_workers, (total, valid_tokens, used))
        loss = total / valid_tokens if valid_tokens else None
        event = {"event": "eval", "step": self.step, "heldout_loss": loss, "rows": int(used)}
        self._report({**event, "columns_read": self.columns_read})

    def save(self) -> None:
        """Gather weights and optimiser state from all workers; rank 0 writes them in a thread."""
        self.saver.wait()  # so that only one copy is in memory
        writes = self.worker.world_rank == 0
        weights = gather_weights(self.engine, keep=writes)
        moments = gather_moments(self.engine, keep=writes)
        if writes:
            self.saver.submit(partial(self._write, self.metadata(self.step), weights, moments))

    def _write(
        self, metadata: CheckpointMetadata, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        """Runs in the saver's thread during training: of the model it reads only shapes."""
        self.log.sync()
        keep = self.train_config.keep_checkpoints
        checkpointing.save(self.run_dir, self.stage.model, metadata, weights, moments, keep)
        self._report({"event": "checkpoint", "step": metadata.step})

    def _report(self, event: dict[str, Any]) -> None:
        if self.worker.world_rank == 0:
            self.log.append(event)
            self.emit(event)

    def _digest_of_keys(self, batches: list[tuple[int, MicroBatch]]) -> str:
        """`keys_digest`, as hex, of the rows that all workers used in a step."""
        mine = keys_digest([key for _, batch in batches for key in batch.keys])
        digest = torch.tensor(np.uint64(mine).astype(np.int64), device=self.worker.device)
        if self.worker.world_size > 1:
            dist.all_reduce(digest)  # int64 sums wrap around, like the digest
        return f"{digest.item() % 2**64:016x}"

    def _data_wait(self, data_seconds: float, seconds: float) -> dict[str, float]:
        """The longest wait for rows of any worker, since the others wait for that one."""
        longest = torch.tensor(data_seconds, dtype=torch.float64, device=self.worker.device)
        if self.worker.world_size > 1:
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        data_seconds = min(longest.item(), seconds)
        return {"data_seconds": data_seconds, "data_share": data_seconds / seconds}

    def _begin(
        self, reader: BatchReader, index: RowIndex, rows: Sequence[tuple[int, int]]
    ) -> Callable[[], MicroBatch | Any]:
        """Start reading rows, each (epoch, position); see StepReader."""
        rows = [row for row in rows if (row[0], int(index.keys[row[1]])) not in self.skipped]
        if not rows:
            return lambda: NO_ROW
        finish = reader.begin(rows, skip=True)

        def micro_batch() -> MicroBatch | Any:
            batch = finish()
            self.skipped.add(batch.failed, usable=len(batch.keys))
            return self._pinned(self.stage.prepare(batch)) if batch.keys else NO_ROW

        return micro_batch

    def _pinned(self, batch: MicroBatch) -> MicroBatch:
        """In pinned memory, for asynchronous copies to a GPU; called in the prefetching thread."""
        if self.worker.device.type != "cuda":
            return batch
        return replace(batch, inputs={n: value.pin_memory() for n, value in batch.inputs.items()})

    def _to_device(self, batch: MicroBatch) -> dict[str, Tensor]:
        device = self.worker.device
        return {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}

    def _sum_over_workers(self, value: float | Tensor) -> float:
        total = torch.as_tensor(value, dtype=torch.float64, device=self.worker.device)
        if self.worker.world_size > 1:
            dist.all_reduce(total)
        return total.item()

    def _check_loss(
        self, loss: float, step: int, batches: list[tuple[int, MicroBatch]], losses: list[Tensor]
    ) -> None:
        """Raise NonFiniteLoss, on all ranks, with the keys of the micro-batches that caused it."""
        if math.isfinite(loss):
            return
        pairs = zip(batches, losses, strict=False)  # leaves out padding passes
        own_keys = [key for (_, batch), part in pairs if not part.isfinite() for key in batch.keys]
        keys_by_rank: list[list[int]] = [[]] * self.worker.world_size
        if self.worker.world_size > 1:
            dist.all_gather_object(keys_by_rank, own_keys)
        else:
            keys_by_rank = [own_keys]
        keys = sorted(key for rank_keys in keys_by_rank for key in rank_keys)
        listed = ", ".join(map(str, keys[:MAX_LISTED_KEYS]))
        raise NonFiniteLoss(
            f"the loss of step {step + 1} is {loss}, from {len(keys)} rows with the keys "
            f"{listed}{', …' if len(keys) > MAX_LISTED_KEYS else ''}: lower train.learning_rate or "
            "check these rows"
        )


def _check_norm(norm: float, step: int) -> float:
    if not math.isfinite(norm):
        raise NonFiniteLoss(
            f"the gradient of step {step + 1} is not finite: lower train.learning_rate"
        )
    return norm
