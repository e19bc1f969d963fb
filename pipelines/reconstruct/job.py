"""Reconstruct: writes a table of images reconstructed from their caption embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.execution.image_job import ImageJob
from pipelines.execution.steps import ModelStep
from pipelines.execution.table_job import run_table_job
from pipelines.reconstruct.config import ReconstructConfig
from pipelines.reconstruct.side_by_side import write_files
from pipelines.storage.tables import Table
from vlv_model.checkpoints.files import read_checkpoint
from vlv_model.checkpoints.layouts import layout_of
from vlv_model.errors import CheckpointError
from vlv_model.squares import Square


@dataclass(frozen=True)
class Reconstruction(ImageJob):
    """An image job that can also write side-by-side image files."""

    side_by_side: bool = False

    def finish(self, table: Table) -> None:
        super().finish(table)
        if self.side_by_side:
            write_files(table, self.square)


def reconstruct(config: ReconstructConfig) -> dict[str, int]:
    """Reconstruct the missing rows of the output table; returns its rows by status.

    Uses the encoder of a stage-1 run, or the encoder as stage 2 trained it further. Raises
    CheckpointError without a trained encoder, and the errors of `run_table_job` and ImageJob.
    """
    model, checkpoint = config.model.resolve(stage="stage1")
    if checkpoint is None:
        raise CheckpointError(
            "model.path must be a training run or a checkpoint: base models have no trained encoder"
        )
    info = read_checkpoint(checkpoint)
    diffusion = config.diffusion.for_samplers(layout_of(model).samplers)
    actors = config.actors.on(config.ray)
    job = Reconstruction(
        kind="reconstruction",
        data=config.data,
        identity={
            "weights": info.sha256,
            "parent": info.parent.sha256 if info.parent else None,
            "base_models": info.base_models,
            "preprocess": model.preprocess,
            **{f"diffusion.{k}": v for k, v in diffusion.model_dump().items()},
        },
        square=Square.of(model),
        step=_open_model,
        arguments=(model, checkpoint, diffusion, actors.use_gpu),
        actors=actors,
        ray=config.ray,
        title="reconstruct",
        side_by_side=config.side_by_side,
    )
    return run_table_job(job, config.data.output, config.ray)


def _open_model(*arguments: Any) -> ModelStep:
    # In the actor: the driver need not wait for the model libraries.
    from pipelines.reconstruct.predictor import ReconstructImages

    return ReconstructImages(*arguments)
