"""Which model a job opens: the settings under `model.*`, and the finished checkpoints of a training run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import Field

from pipelines.cli.config import InputPath
from vlv_model.checkpoints.files import WEIGHTS_FILE, read_checkpoint
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError

CHECKPOINTS = "checkpoints"
"""Folder of a training run's checkpoints."""


class ModelSettings(ModelConfig):
    """The base models and, with `path`, the trained weights on top of them."""

    path: InputPath | None = Field(
        None,
        description="what to start from: the run folder of a training, one of its checkpoints, or "
        "a folder of base models (with model.json); settings given beside it win over its own",
    )

    def resolve(
        self, parts: Iterable[str] = (), known: Mapping[str, str] | None = None
    ) -> tuple[ModelConfig, Path | None]:
        """(base models and sizes, folder of the checkpoint or None), for a job that opens `parts`.

        Ids of the hub that these are read from come at one commit, so that all processes of the
        job read the same files; `known` are those that an earlier attempt read, by field. Raises
        ModelError or CheckpointError where `path` is not what it should be, or the hub has no
        such id.
        """
        # Here, so that --help need not wait for the libraries of the models.
        from vlv_model.checkpoints.sources import pin

        config, checkpoint = self.find()
        return pin(config, parts, known), checkpoint

    def find(self) -> tuple[ModelConfig, Path | None]:
        """What `resolve` returns, without asking the hub: its ids stay as they are given."""
        from vlv_model.checkpoints.sources import resolve_checkpoint, resolve_model

        given = self.model_dump(include=self.model_fields_set - {"path"})
        if self.path is None:
            return resolve_model(ModelConfig(**given))
        folder = Path(self.path)
        if os.path.isfile(folder / "run.json"):
            folder = latest_checkpoint(folder) or folder
            if not os.path.isfile(folder / "checkpoint.json"):
                raise CheckpointError(
                    f"model.path={self.path}: this run has no finished checkpoint yet: "
                    "let its training reach one"
                )
        return resolve_checkpoint(folder, parts=given)


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def finished_checkpoints(run_dir: Path) -> Iterator[Path]:
    """Finished checkpoints of a run, newest first."""
    for folder in sorted((run_dir / CHECKPOINTS).glob("step-*"), reverse=True):
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
