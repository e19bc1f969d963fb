"""Checkpoints are complete or absent, and are written while training goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.execution.model import CHECKPOINTS, checkpoint_name, latest_checkpoint
from pipelines.training.checkpointing import (
    Saver,
    prune,
    remove_unfinished,
    save,
)
from vlv_model.checkpoints.weights import CheckpointMetadata
from vlv_model.config import ModelConfig

WRITER = """
import sys
from pathlib import Path
from tests.pipelines.training.test_checkpointing import write
for step in range(1, 100):
    write(Path(sys.argv[1]), step, size=8_000_000)
"""


class Net(torch.nn.Module):
    base_parts = ()

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))


def write(run_dir: Path, step: int, size: int = 8, keep: int = 2) -> Path:
    """Write a checkpoint whose values all equal its step."""
    model = ModelConfig()
    about = CheckpointMetadata(stage="stage1", step=step, rows_seen=step, config={}, model=model)
    numbers = torch.full((size,), float(step))
    moments = {f"weight.{moment}": numbers.clone() for moment in ("exp_avg", "exp_avg_sq")}
    return save(run_dir, Net(size), about, {"weight": numbers}, moments, keep)


def test_prune_keeps_the_newest_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert sorted(os.listdir(tmp_path / CHECKPOINTS)) == [checkpoint_name(2), checkpoint_name(3)]


def test_an_incomplete_checkpoint_is_skipped_and_rewritten(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / CHECKPOINTS / checkpoint_name(2) / "optimizer.safetensors").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / CHECKPOINTS / checkpoint_name(1)
    assert write(tmp_path, 2) == latest_checkpoint(tmp_path)


@pytest.mark.parametrize("moment", [0.0, 0.03])
def test_after_a_kill_during_writing_the_previous_checkpoint_is_used(
    tmp_path: Path, moment: float
) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    folder, deadline = tmp_path / CHECKPOINTS, time.monotonic() + 60
    while not (folder / checkpoint_name(3)).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    while not (half := list(folder.glob(".step-*"))) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(moment)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert half
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    for name in ("model", "optimizer"):
        for tensor in load_file(newest / f"{name}.safetensors").values():
            assert (tensor == int(newest.name[-2:])).all()
    prune(tmp_path, keep=1)
    # What is being written may be another's: it goes when the next training starts.
    assert set(os.listdir(folder)) - {newest.name} == {half.name for half in folder.glob(".step-*")}
    remove_unfinished(tmp_path)
    assert os.listdir(folder) == [newest.name]


def test_saver_writes_in_order_in_a_thread(tmp_path: Path) -> None:
    saver, go, written = Saver(), threading.Event(), []
    saver.submit(lambda: (go.wait(60), written.append(1))[1])
    assert written == []  # the training goes on
    go.set()
    saver.submit(lambda: written.append(2))
    saver.wait()
    assert written == [1, 2]


def test_an_error_in_the_thread_is_raised_by_the_next_save(tmp_path: Path) -> None:
    saver = Saver()
    (tmp_path / CHECKPOINTS).write_text("no folder")
    saver.submit(lambda: write(tmp_path, 1))
    with pytest.raises(OSError, match="checkpoints"):
        saver.submit(lambda: None)
    saver.wait()  # raised only once
