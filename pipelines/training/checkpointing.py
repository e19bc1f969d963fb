"""Training checkpoints: trained weights and the optimiser's state, by the names of the parameters.

    <run_dir>/checkpoints/step-00001000/
        model.safetensors      trainable weights, float32 (under bfloat16: the master weights)
        optimizer.safetensors  AdamW's two moments of each weight
        checkpoint.json        step, rows seen, settings, base models, parent, digests

A checkpoint is written to a temporary folder and renamed, so it is either complete or absent. The
schedule, the position in the data and all random draws follow from the step, so nothing else needs
saving. Nothing in a checkpoint depends on the number of workers or the ZeRO stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.execution.model import CHECKPOINTS, checkpoint_name, finished_checkpoints
from vlv_model.checkpoints.files import (
    WEIGHTS_FILE,
    CheckpointMetadata,
    open_tensors,
    read_checkpoint,
    shapes_in,
)
from vlv_model.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

OPTIMIZER_FILE = "optimizer.safetensors"


def save(
    run_dir: Path,
    model: nn.Module,
    metadata: CheckpointMetadata,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    keep: int,
) -> Path:
    """Write a checkpoint from gathered tensors, then delete all but the `keep` newest."""
    from vlv_model.checkpoints.weights import save_checkpoint

    folder = run_dir / CHECKPOINTS / checkpoint_name(metadata.step)
    shutil.rmtree(folder, ignore_errors=True)  # an unfinished one of an earlier attempt
    save_checkpoint(folder, model, metadata, weights, more_files={OPTIMIZER_FILE: moments})
    prune(run_dir, keep)
    return folder


class Saver:
    """A thread that writes one checkpoint at a time, so that training waits only for the copy to the CPU.

    An error in the thread is raised by the next `submit` or `wait`. A killed process leaves a temporary
    folder, which the next start of the run removes.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Wait for the previous checkpoint, then run `write` in the thread."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        """Wait until everything is written; raises the error of a failed write."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def prune(run_dir: Path, keep: int) -> None:
    """Delete all checkpoints but the `keep` newest finished ones."""
    kept = list(finished_checkpoints(run_dir))[:keep]
    for other in (run_dir / CHECKPOINTS).glob("step-*"):
        if other not in kept:
            shutil.rmtree(other, ignore_errors=True)


def remove_unfinished(run_dir: Path) -> None:
    """Delete temporary folders that killed processes left behind.

    Called only when a run starts: a rank of a killed job may live on for seconds and save, and must
    not delete what the new job is writing.
    """
    for folder in (run_dir / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def load_optimizer(engine: Any, folder: Path) -> None:
    """Restore the optimiser of a new engine from a checkpoint, at any world size and ZeRO stage.

    The caller has loaded the module's weights and verified the files (`verify_checkpoint`). Raises
    CheckpointError when the optimiser's file is missing or does not match the trainable parameters.
    """
    from pipelines.training import optimizer_state
    from vlv_model.checkpoints.weights import describe_mismatches

    info = read_checkpoint(folder)
    if OPTIMIZER_FILE not in info.more_files:
        raise CheckpointError(
            f"'{folder}' has no {OPTIMIZER_FILE}, so no run can continue from it: start a new one "
            f"with model.path={folder}"
        )
    file = folder / OPTIMIZER_FILE
    with open_tensors(folder / WEIGHTS_FILE) as weights, open_tensors(file) as states:
        expected = {
            optimizer_state.moment_name(name, moment): optimizer_state.full_shape(parameter)
            for name, parameter in optimizer_state.trainable(engine.module)
            for moment in optimizer_state.MOMENTS
        }
        if misfits := describe_mismatches(shapes_in(states), expected):
            raise CheckpointError(f"'{file}' does not fit the model: {'; '.join(misfits)}")
        optimizer_state.restore(engine, info.step, weights.get_tensor, states.get_tensor)
