"""Recaption: writes a caption table of an image table, one row per image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipelines.execution.cluster import Cluster
from pipelines.execution.image_job import ROW_GROUP, ImageJob
from pipelines.execution.steps import ModelStep
from pipelines.execution.table_job import run_table_job
from pipelines.images.card import FILE as CARD_FILE
from pipelines.images.rows import CAPTION_ROW, JOINED_ROW
from pipelines.recaption.card import model_notes, write_card
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.gate import check_gates
from pipelines.recaption.identity import as_settings, caption_identity, check_length, fingerprint_of
from pipelines.recaption.json_file import FILE as JSON_FILE
from pipelines.recaption.json_file import write_json
from pipelines.recaption.report import FILE as REPORT_FILE
from pipelines.recaption.report import remove_derived_files, write_report
from pipelines.recaption.survey import Survey, survey
from pipelines.storage.files import is_file, remove_file
from pipelines.storage.tables import (
    IMAGE_ROW_GROUP,
    PUBLISHED_FILE,
    Table,
    check_same_settings,
    read_json_object,
)
from vlv_model.squares import Square


@dataclass(frozen=True)
class Recaption(ImageJob):
    """An image job whose table is surveyed, checked against gates, and published."""

    config: RecaptionConfig = field(kw_only=True)
    model_notes: dict[str, Any] = field(kw_only=True)  # the model in the table's card

    def plan(self, table: Table) -> None:
        # Before the fingerprints are compared, which tell nobody what differs.
        if table.exists and (recorded := table.describe().get("captioner")):
            check_same_settings(table.folder, recorded, self.notes["captioner"], "data.output")
        super().plan(table)
        if table.pending():
            remove_file(table.folder / PUBLISHED_FILE)  # it describes other rows
            remove_derived_files(table)
        if (found := Survey.read(table)) and found.rows != sum(table.counts().values()):
            remove_derived_files(table)  # a takedown of images has removed rows

    def is_done(self, table: Table) -> bool:
        return Survey.read(table) is not None

    def run(self, table: Table, cluster: Cluster) -> None:
        super().run(table, cluster)
        survey(cluster, table)

    def finish(self, table: Table) -> None:
        publish(table, self.config, self.model_notes)


def recaption(config: RecaptionConfig) -> dict[str, int]:
    """Caption the missing rows of the output table and publish it; returns its rows by status.

    Raises CheckpointError without a trained captioner, ConfigError for captions longer than its language
    model can write, GateError when the captions do not pass `gate.*`, and the errors of `run_table_job`
    and ImageJob.
    """
    model, checkpoint = config.model.resolve(stage="stage2")
    made_of = caption_identity(model, checkpoint, config.generate)
    fingerprint = fingerprint_of(made_of)
    assert checkpoint is not None
    check_length(model, config.generate)
    earlier = config.earlier
    actors = config.actors.on(config.ray)
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
        step=open_step,
        arguments=(model, checkpoint, config.generate, fingerprint, actors.use_gpu),
        actors=actors,
        ray=config.ray,
        title="recaption",
        row_group=IMAGE_ROW_GROUP if config.join else ROW_GROUP,
        in_flight=_chunks_in_flight(config),
        keep_images=config.join,
        columns=(JOINED_ROW if config.join else CAPTION_ROW).names,
        among=earlier.keys if earlier.captions else None,
        sums={"tokens": "num_tokens"},
        notes={"checked": True, "captioner": as_settings(made_of)},
        config=config,
        model_notes=model_notes(model, checkpoint, fingerprint),
    )
    return run_table_job(job, config.data.output, config.ray)


def open_step(*arguments: Any) -> ModelStep:
    """The step of an actor, CaptionImages; imported there, so the driver loads no model library."""
    from pipelines.recaption.predictor import CaptionImages

    return CaptionImages(*arguments)


def _chunks_in_flight(config: RecaptionConfig) -> int:
    """Chunks that keep an engine full: one that ends, those that fill its slots, one that waits."""
    return 2 + -(-config.generate.batch_size // config.data.rows_per_chunk)


def publish(table: Table, config: RecaptionConfig, model: dict[str, Any]) -> None:
    """Check a surveyed table against the gates, write its card, and let other jobs read it.

    The report is written first, since it shows why a gate fails.
    """
    health = Survey.read(table)
    assert health is not None
    published = config.model_dump(include={"gate", "generate", "join", "license"})
    published["model"] = model
    if _is_published(table, published, config.format):
        return
    write_report(table, health, published)
    check_gates(config.gate, health, table)
    if config.format == "json" and not is_file(table.folder / JSON_FILE):
        write_json(table)
    table.publish(published)
    write_card(table)


def _is_published(table: Table, published: dict[str, Any], format: str) -> bool:
    """Whether all files of `publish` exist and have these settings."""
    files = [PUBLISHED_FILE, CARD_FILE, REPORT_FILE, *([JSON_FILE] if format == "json" else [])]
    if not all(is_file(table.folder / name) for name in files):
        return False
    return read_json_object(table.folder / PUBLISHED_FILE) == published
