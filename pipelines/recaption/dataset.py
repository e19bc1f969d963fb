"""Recaption: an image table in, a caption table out, one caption per image."""

from __future__ import annotations

import time

from pipelines.places import exclusive, remove_file
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.gate import check_gates
from pipelines.recaption.survey import FILE as HEALTH_FILE
from pipelines.recaption.survey import Survey, survey
from pipelines.runtime import ray_session
from pipelines.schemas import CAPTION_ROW
from pipelines.selection import open_table, run_actors
from pipelines.storage import PUBLISHED_FILE, Table


def recaption(config: RecaptionConfig) -> dict[str, int]:
    """Caption what the output table still lacks and publish it; returns its rows by status.

    Raises CheckpointError without a trained captioner, what `open_table` raises, and GateError
    where the captions are worse than `gate.*` allows.
    """
    # Here, so that --help need not wait for the libraries of the models.
    from pipelines.recaption.predictor import CaptionImages, model_fingerprint

    model, checkpoint = config.model.resolve()
    fingerprint = model_fingerprint(model, checkpoint, config.generate)
    identity = {"model": fingerprint}
    table = open_table("caption", config.data, identity, CAPTION_ROW.names, checked=True)
    if table.pending():
        for name in (PUBLISHED_FILE, HEALTH_FILE):  # of other rows
            remove_file(table.folder / name)
    if Survey.read(table) is None:
        arguments = (model, checkpoint, config.generate, fingerprint, config.actors.use_gpu)
        with ray_session(config.ray):  # one for both
            run_actors(
                table, model.image_size, CaptionImages, arguments, config.actors, config.ray,
                "recaption",
            )  # fmt: skip
            with exclusive(table.folder, "data.output"):
                survey(table)
    publish(table, config)
    return table.counts()


def publish(table: Table, config: RecaptionConfig) -> None:
    """Hold a table with a survey against the gates, and let other jobs read it."""
    found = Survey.read(table)
    assert found is not None
    check_gates(config.gate, found, table)
    if table.lacks():
        table.publish({"time": time.time(), "gate": config.gate.model_dump()})
