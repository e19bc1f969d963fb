"""The checkpoints of a training run: which there are, and which were written to their end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlv_model.checkpoints.files import WEIGHTS_FILE, read_checkpoint
from vlv_model.errors import CheckpointError

FOLDER = "checkpoints"


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def finished_checkpoints(run_dir: Path) -> Iterator[Path]:
    """Finished checkpoints of a run, newest first."""
    for folder in sorted((run_dir / FOLDER).glob("step-*"), reverse=True):
        if is_finished(folder):
            yield folder


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end."""
    return next(finished_checkpoints(run_dir), None)


def is_finished(folder: Path) -> bool:
    """True when all files are there, each in the length that its own head tells.

    That they were renamed together is not enough: a folder may have been copied in part.
    """
    from safetensors import SafetensorError, safe_open

    try:
        files = [WEIGHTS_FILE, *read_checkpoint(folder).more_files]
        for name in files:
            with safe_open(folder / name, "np"):
                pass
        return True
    except (OSError, SafetensorError, CheckpointError):
        return False
