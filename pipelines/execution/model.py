"""Which model a job opens: the settings under `model.*`, and the finished checkpoints of a training run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipelines.cli.config import as_input
from vlv_model.checkpoints.files import WEIGHTS_FILE, read_checkpoint
from vlv_model.checkpoints.layouts import read_parts
from vlv_model.checkpoints.parts import check_parts
from vlv_model.checkpoints.sources import pin, resolve_checkpoint, resolve_model
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, ModelError

CHECKPOINTS = "checkpoints"
"""Folder of a training run's checkpoints."""


_SHIPPED = Path(__file__).parents[1] / "tiny_world" / "pretrained"
_PREFIX = "tiny/"


def _model_path(path: str) -> str:
    """The folder of a model: a path, or the name of one that comes with the code."""
    name = path.removeprefix(_PREFIX)
    if name != path and name in shipped_models() and not os.path.exists(path):
        return str(_SHIPPED / name)
    return as_input(path)


def shipped_models() -> list[str]:
    """The names after `tiny/` that stand for a shipped model: the folders of the tiny world's weights."""
    return sorted(f.name for f in _SHIPPED.iterdir() if f.is_dir() and f.name[0] not in "._")


class ModelSettings(ModelConfig):
    """The base models and, with `path`, the trained weights on top of them."""

    path: Annotated[str, AfterValidator(_model_path)] | None = Field(
        None,
        description="what to start from: the run folder of a training, one of its checkpoints, or "
        "a folder of base models (with model.json). tiny/models, tiny/stage1 and tiny/stage2 come with "
        "the code: tiny models of drawn scenes. Settings given beside it win over its own",
    )

    def resolve(
        self,
        parts: Iterable[str] = (),
        known: Mapping[str, str] | None = None,
        *,
        stage: Literal["stage1", "stage2"] | None = None,
    ) -> tuple[ModelConfig, Path | None]:
        """(base models and sizes, folder of the checkpoint or None), for a job that opens `parts`.

        With `stage` these are all parts of that stage's model.

        Ids of the hub that these are read from come at one commit, so that all processes of the
        job read the same files; `known` are those that an earlier attempt read, by field. Raises
        ModelError or CheckpointError where `path` is not what it should be, a part's files are not
        those of its model, or neither the hub nor its local cache has an id. Takes a second or two
        and loads no library of the models, so that a job can fail before it starts anything.
        """
        config, checkpoint = self.find()
        parts = list(parts) if stage is None else read_parts(stage, config)
        try:
            config = pin(config, parts, known)
            check_parts(config, parts)
        except ModelError as problem:
            if self.path is None and not self.model_fields_set:
                raise ModelError(
                    f"{problem}. model.path is not set, so the published base models are used: set it "
                    "to a folder, or to tiny/models, which come with the code"
                ) from problem
            raise
        return config, checkpoint

    def find(self) -> tuple[ModelConfig, Path | None]:
        """What `resolve` returns, without asking the hub: its ids stay as they are given."""
        given = self.model_dump(include=self.model_fields_set - {"path"})
        if self.path is None:
            return resolve_model(ModelConfig(**given))
        folder = Path(self.path)
        if not folder.exists():
            shipped = ", ".join(_PREFIX + name for name in shipped_models())
            raise ModelError(
                f"model.path={self.path} does not exist: give a training run, one of its checkpoints, "
                f"a folder with model.json, or one of {shipped}"
            )
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
