"""Writes trained weights next to their base models, without absolute paths."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipelines.execution.model import ModelSettings
from pipelines.storage.files import write_atomically
from pipelines.storage.tables import read_json_object
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.checkpoints.files import (
    CheckpointMetadata,
    Parent,
    read_checkpoint,
    read_weights,
    write_checkpoint,
)
from vlv_model.checkpoints.sources import resolve_model
from vlv_model.checkpoints.weights import save_checkpoint
from vlv_model.errors import CheckpointError, RunError


def ship_stage1(run: str | os.PathLike[str], models: Path, target: Path) -> Path:
    """Write the newest checkpoint of a stage-1 run to `target`, with relative paths to `models`.

    Returns `target`. Raises CheckpointError if the run was trained on other models, RunError if `target`
    exists.
    """
    if target.exists():
        raise RunError(f"{target} exists already: remove it first")
    _, checkpoint = ModelSettings(path=str(run)).resolve()
    if checkpoint is None:
        raise CheckpointError(f"stage1={run} is not a stage-1 run or checkpoint")
    info = read_checkpoint(checkpoint)
    model, _ = resolve_model(models)
    metadata = CheckpointMetadata(
        stage="stage1",
        step=info.step,
        rows_seen=info.rows_seen,
        config={"train": info.config.get("train", {})},
        model=model,
    )
    save_checkpoint(target, VLVAutoEncoder.from_pretrained(model, checkpoint), metadata)
    return _with_relative_paths(target)


def ship_stage2(run: str | os.PathLike[str], stage1: Path, target: Path) -> Path:
    """Write the newest checkpoint of a stage-2 run on the shipped `stage1` to `target`.

    Returns `target`. Raises CheckpointError if the run was trained on another encoder, RunError if
    `target` exists.
    """
    if target.exists():
        raise RunError(f"{target} exists already: remove it first")
    _, checkpoint = ModelSettings(path=str(run)).resolve()
    info = read_checkpoint(checkpoint or Path(run))
    if info.parent is None or info.parent.sha256 != read_checkpoint(stage1).sha256:
        raise CheckpointError(f"stage2={run} was not trained on the encoder in {stage1}")
    weights = read_weights(checkpoint or Path(run), info)
    rewritten = {"format_version", "tensors", "sha256", "parent", "more_files"}
    about = info.model_dump(exclude=rewritten)
    about["config"] = {"train": info.config.get("train", {})}
    about["parent"] = Parent(path=os.path.relpath(stage1, target), sha256=info.parent.sha256)
    about["model"] = resolve_model(stage1)[0]
    return _with_relative_paths(write_checkpoint(target, weights, about))


def _with_relative_paths(target: Path) -> Path:
    content = read_json_object(target / "checkpoint.json")
    for part in ("florence", "diffusion", "language_model"):
        content["model"][part] = os.path.relpath(content["model"][part], target.resolve())
    write_atomically(target / "checkpoint.json", json.dumps(content, indent=2) + "\n")
    return target
