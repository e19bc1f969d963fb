"""Recaption: an image table in, a caption table out, one caption per image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipelines.execution.cluster import Cluster
from pipelines.execution.image_job import ROW_GROUP, ImageJob
from pipelines.execution.table_job import run_table_job
from pipelines.images.card import FILE as CARD_FILE
from pipelines.images.rows import CAPTION_ROW, JOINED_ROW
from pipelines.recaption.card import model_notes, write_card
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.gate import check_gates
from pipelines.recaption.json_file import FILE as JSON_FILE
from pipelines.recaption.json_file import write_json
from pipelines.recaption.report import FILE as REPORT_FILE
from pipelines.recaption.report import forget, write_report
from pipelines.recaption.survey import Survey, survey
from pipelines.storage.files import is_file, remove_file
from pipelines.storage.tables import IMAGE_ROW_GROUP, PUBLISHED_FILE, Table, read_json_object
from vlv_model.squares import Square


@dataclass(frozen=True)
class Recaption(ImageJob):
    """An image job whose table is surveyed, held against gates, and published."""

    config: RecaptionConfig = field(kw_only=True)
    about_model: dict[str, Any] = field(kw_only=True)  # what its card says of the model

    def plan(self, table: Table) -> None:
        super().plan(table)
        if table.pending():
            remove_file(table.folder / PUBLISHED_FILE)  # it and what lies beside tell of other rows
            forget(table)
        if (found := Survey.read(table)) and found.rows != sum(table.counts().values()):
            forget(table)  # rows of it were taken down of the images alone

    def is_done(self, table: Table) -> bool:
        return Survey.read(table) is not None

    def run(self, table: Table, cluster: Cluster) -> None:
        super().run(table, cluster)
        survey(cluster, table)

    def finish(self, table: Table) -> None:
        publish(table, self.config, self.about_model)


def recaption(config: RecaptionConfig) -> dict[str, int]:
    """Caption what the output table still lacks and publish it; returns its rows by status.

    Raises CheckpointError without a trained captioner, what `run_table_job` and ImageJob raise, and
    GateError where the captions are worse than `gate.*` allows.
    """
    # Here, so that --help need not wait for the libraries of the models.
    from pipelines.recaption.predictor import CaptionImages, model_fingerprint
    from vlv_model.captioner import VLVCaptioner

    model, checkpoint = config.model.resolve(VLVCaptioner.read_parts)
    fingerprint = model_fingerprint(model, checkpoint, config.generate)
    assert checkpoint is not None
    earlier = config.earlier
    job = Recaption(
        kind="caption",
        data=config.data,
        identity={
            "model": fingerprint,
            "join": config.join or None,
            "earlier.captions": earlier.captions,
            "earlier.where": earlier.where,
        },
        square=Square.of(model),
        step=CaptionImages,
        arguments=(model, checkpoint, config.generate, fingerprint, config.actors.use_gpu),
        actors=config.actors,
        ray=config.ray,
        title="recaption",
        row_group=IMAGE_ROW_GROUP if config.join else ROW_GROUP,
        keep_images=config.join,
        columns=(JOINED_ROW if config.join else CAPTION_ROW).names,
        among=earlier.keys if earlier.captions else None,
        sums={"tokens": "num_tokens"},
        notes={"checked": True},
        config=config,
        about_model=model_notes(model, checkpoint, fingerprint),
    )
    return run_table_job(job, config.data.output, config.ray)


def publish(table: Table, config: RecaptionConfig, model: dict[str, Any]) -> None:
    """Hold a table with a survey against the gates, write its card, and let other jobs read it.

    Its report is written in any case: who fails a gate has to see why.
    """
    found = Survey.read(table)
    assert found is not None
    about = config.model_dump(include={"gate", "generate", "join", "license"})
    about["model"] = model
    if _is_published(table, about, config.format):
        return
    write_report(table, found, about)
    check_gates(config.gate, found, table)
    if config.format == "json" and not is_file(table.folder / JSON_FILE):
        write_json(table)
    table.publish(about)
    write_card(table)


def _is_published(table: Table, about: dict[str, Any], format: str) -> bool:
    """Whether all that `publish` writes is there, of these settings."""
    beside = [PUBLISHED_FILE, CARD_FILE, REPORT_FILE, *([JSON_FILE] if format == "json" else [])]
    if not all(is_file(table.folder / name) for name in beside):
        return False
    return read_json_object(table.folder / PUBLISHED_FILE) == about
