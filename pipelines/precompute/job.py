"""Precompute: writes a table of the images' VAE latents, for stage 1."""

from __future__ import annotations

from pipelines.execution.image_job import ImageJob
from pipelines.execution.table_job import run_table_job
from pipelines.images.latents import KIND, latents_identity
from pipelines.precompute.config import PrecomputeConfig
from pipelines.storage.tables import IMAGE_ROW_GROUP, Table
from vlv_model.squares import Square


def precompute(config: PrecomputeConfig) -> dict[str, int]:
    """Encode the missing rows of the output table; returns its rows by status.

    Raises ModelError when the VAE cannot be loaded, and the errors of `run_table_job` and ImageJob.
    """
    # Imported here, since the model libraries would delay --help.
    from pipelines.precompute.predictor import EncodeImages
    from vlv_model.checkpoints.loading import load_vae

    model, _ = config.model.resolve(["vae"])
    load_vae(model)  # fails early; a VAE of the hub is downloaded, so it has a fingerprint
    output = Table(config.data.output)
    recorded = output.describe()["identity"] if output.exists else None
    actors = config.actors.on(config.ray)
    job = ImageJob(
        kind=KIND,
        data=config.data,
        identity={**latents_identity(model, recorded), "precision": config.encode.precision},
        square=Square.of(model),
        step=EncodeImages,
        arguments=(model, config.encode, actors.use_gpu),
        actors=actors,
        ray=config.ray,
        title="precompute",
        row_group=IMAGE_ROW_GROUP,  # training reads single rows in random order
    )
    return run_table_job(job, config.data.output, config.ray)
