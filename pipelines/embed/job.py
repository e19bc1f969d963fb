"""Embed: writes a table of features of images or captions (pipelines.images.features)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipelines.embed.config import EmbedConfig
from pipelines.embed.duplicates import is_marked, mark_duplicates
from pipelines.execution.cluster import Cluster
from pipelines.execution.image_job import ImageJob
from pipelines.execution.read_texts import ReadTexts
from pipelines.execution.steps import Chunk
from pipelines.execution.table_job import run_table_job
from pipelines.images.features import KIND
from pipelines.storage.tables import Table
from vlv_model.squares import Square


@dataclass(frozen=True)
class Embedding(ImageJob):
    """An image job that can also read captions, and marks duplicates at the end."""

    text_column: str | None = None
    duplicates: float | None = None

    def is_done(self, table: Table) -> bool:
        marked = self.duplicates is None or is_marked(table, self.duplicates)
        return super().is_done(table) and marked

    def run(self, table: Table, cluster: Cluster) -> None:
        super().run(table, cluster)
        if self.duplicates is not None:
            print("embed: comparing features …", file=sys.stderr, flush=True)
            count = mark_duplicates(table, self.duplicates)
            print(
                f"embed: {count:,} rows have a cosine of at least {self.duplicates:g} with an earlier one",
                file=sys.stderr,
            )

    def reader(self, table: Table) -> Callable[[Chunk], Chunk]:
        if self.text_column is not None:
            return ReadTexts(table, self.text_column)
        return super().reader(table)


def embed(config: EmbedConfig) -> dict[str, int]:
    """Embed the missing rows of the output table; returns its rows by status.

    Raises ModelError when the extractor cannot be loaded, and the errors of `run_table_job` and ImageJob.
    """
    actors = config.actors.on(config.ray)

    # Imported here, since the model libraries would delay --help and the errors above.
    from pipelines.embed.predictor import EmbedRows
    from vlv_model.features.extractors import load_extractor, pinned

    data, settings = config.data, pinned(config.embed)
    # Fails early; weights of the hub are downloaded, so they have a digest.
    extractor = load_extractor(settings)
    if extractor.takes_text and data.text_column is None:
        data = data.model_copy(update={"text_column": "caption"})
    identity: dict[str, Any] = {
        "embed.extractor": settings.extractor,
        **{f"embed.{name}": value for name, value in extractor.identity.items()},
        "embed.precision": settings.precision,
        "embed.scores_only": settings.scores_only or None,
        "embed.duplicates": settings.duplicates,
        "data.text_column": data.text_column,
    }
    job = Embedding(
        kind=KIND,
        data=data,
        identity=identity,
        square=getattr(extractor, "square", Square(1)),
        step=EmbedRows,
        arguments=(settings, actors.use_gpu),
        actors=actors,
        ray=config.ray,
        title="embed",
        notes={"versions": {name: version(name) for name in ("torch", "transformers", "pillow")}},
        text_column=data.text_column,
        duplicates=settings.duplicates,
    )
    return run_table_job(job, data.output, config.ray)
