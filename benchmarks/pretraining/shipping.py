"""Writes stage-1 weights next to their base models, without absolute paths."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipelines.execution.model import ModelSettings
from pipelines.storage.files import write_atomically
from pipelines.storage.tables import read_json_object
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.checkpoints.sources import resolve_model
from vlv_model.checkpoints.weights import CheckpointMetadata, read_checkpoint, save_checkpoint
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
    content = read_json_object(target / "checkpoint.json")
    for part in ("florence", "diffusion", "language_model"):
        content["model"][part] = os.path.relpath(content["model"][part], target.resolve())
    write_atomically(target / "checkpoint.json", json.dumps(content, indent=2) + "\n")
    return target
