"""Recaption: an image table in, a caption table out, one caption per image."""

from __future__ import annotations

from pipelines.recaption.config import RecaptionConfig
from pipelines.selection import open_table, run_actors


def recaption(config: RecaptionConfig) -> dict[str, int]:
    """Caption what the output table still lacks; returns its rows by status.

    Raises CheckpointError without a trained captioner, and what `open_table` raises.
    """
    # Here, so that --help need not wait for the libraries of the models.
    from pipelines.recaption.predictor import CaptionImages, model_fingerprint

    model, checkpoint = config.model.resolve()
    fingerprint = model_fingerprint(model, checkpoint, config.generate)
    table = open_table("caption", config.data, {"model": fingerprint})
    arguments = (model, checkpoint, config.generate, fingerprint, config.actors.use_gpu)
    run_actors(
        table, model.image_size, CaptionImages, arguments, config.actors, config.ray, "recaption"
    )
    return table.counts()
