"""Reconstruct: an image table in, a table of the pictures that the caption embeddings give back."""

from __future__ import annotations

from pipelines.execution.image_job import open_table, run_actors
from pipelines.reconstruct.config import ReconstructConfig
from pipelines.reconstruct.side_by_side import write_files
from pipelines.storage.locks import exclusive
from vlv_model.checkpoint_files import read_checkpoint
from vlv_model.errors import CheckpointError
from vlv_model.squares import Square


def reconstruct(config: ReconstructConfig) -> dict[str, int]:
    """Reconstruct what the output table still lacks; returns its rows by status.

    From a stage-1 run its encoder is looked at, from a stage-2 run the encoder as stage 2 left it.
    Raises CheckpointError without a trained encoder, and what `open_table` raises.
    """
    # Here, so that --help need not wait for the libraries of the models.
    from pipelines.reconstruct.predictor import ReconstructImages
    from vlv_model.autoencoder import VLVAutoEncoder

    model, checkpoint = config.model.resolve(VLVAutoEncoder.read_parts)
    if checkpoint is None:
        raise CheckpointError(
            "model.path has to name a run or a checkpoint: its encoder is what is looked at"
        )
    info = read_checkpoint(checkpoint)
    identity = {
        "weights": info.sha256,
        "parent": info.parent.sha256 if info.parent else None,
        "base_models": info.base_models,
        "preprocess": model.preprocess,
        **{f"diffusion.{k}": v for k, v in config.diffusion.model_dump().items()},
    }
    table = open_table("reconstruction", config.data, identity)
    arguments = (model, checkpoint, config.diffusion, config.actors.use_gpu)
    run_actors(
        table,
        Square.of(model),
        ReconstructImages,
        arguments,
        config.actors,
        config.ray,
        "reconstruct",
    )
    if config.side_by_side:
        with exclusive(table.folder, "data.output"):
            write_files(table, Square.of(model))
    return table.counts()
