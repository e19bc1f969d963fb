"""Precompute: writes a table of the images' VAE latents, for stage 1."""

from __future__ import annotations

from typing import Any

from pipelines.cli.waiting import waiting
from pipelines.execution.image_job import ImageJob
from pipelines.execution.steps import ModelStep
from pipelines.execution.table_job import run_table_job
from pipelines.images.latents import KIND, latents_identity
from pipelines.images.sources import find_source
from pipelines.precompute.config import PrecomputeConfig
from pipelines.storage.tables import IMAGE_ROW_GROUP, Table
from vlv_model.checkpoints.digests import fingerprint, is_digest
from vlv_model.checkpoints.sources import part_source
from vlv_model.config import ModelConfig
from vlv_model.squares import Square


def precompute(config: PrecomputeConfig) -> dict[str, int]:
    """Encode the missing rows of the output table; returns its rows by status.

    Raises ModelError when the VAE cannot be loaded, and the errors of `run_table_job` and ImageJob.
    """
    actors = config.actors.on(config.ray)
    model, _ = config.model.resolve(["vae"])
    data, output = config.data, Table(config.data.output)
    if not output.exists:  # the VAE's configuration is read by a library that takes seconds
        find_source(data.input, data.image_column, data.key_column)
    if not is_digest(fingerprint(part_source(model, "vae"))):
        with waiting("downloading the VAE"):
            _download_vae(model)  # so that it has a fingerprint
    recorded = output.describe()["identity"] if output.exists else None
    job = ImageJob(
        kind=KIND,
        data=data,
        identity={**latents_identity(model, recorded), "precision": config.encode.precision},
        square=Square.of(model),
        step=_open_model,
        arguments=(model, config.encode, actors.use_gpu),
        actors=actors,
        ray=config.ray,
        title="precompute",
        row_group=IMAGE_ROW_GROUP,  # training reads single rows in random order
    )
    return run_table_job(job, data.output, config.ray)


def _download_vae(model: ModelConfig) -> None:
    from vlv_model.checkpoints.loading import load_vae  # transformers and diffusers

    load_vae(model)


def _open_model(*arguments: Any) -> ModelStep:
    # In the actor: the driver need not wait for the model libraries.
    from pipelines.precompute.predictor import EncodeImages

    return EncodeImages(*arguments)
