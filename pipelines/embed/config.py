"""Settings of embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from pipelines.embed.texts import list_texts
from pipelines.estimate.config import DRY_RUN, EstimateConfig
from pipelines.execution.connection import RayConfig
from pipelines.execution.image_job import ActorConfig
from pipelines.images.random_access import usable_rows
from pipelines.images.selection import Selection
from pipelines.storage.files import as_path
from vlv_model.config import Config
from vlv_model.features.settings import ExtractorConfig


class EmbedData(Selection):
    """The images or captions that are embedded."""

    text_column: str | None = Field(
        None,
        description="clip-text: column of the captions, of a table, Parquet, CSV, TSV, JSONL or JSON; "
        "default: caption",
    )

    def images(self, again: bool = False) -> tuple[list[Path], dict[str, Any]]:
        if self.text_column is None:
            return super().images(again)
        request = (self.input, self.text_column, self.key_column, self.where)
        return list_texts(as_path(self.output), *request, again=again, features=self.features)

    def usable_rows(self, files: Sequence[Path]) -> Iterator[np.ndarray]:
        if self.text_column is None:
            return super().usable_rows(files)
        return usable_rows(files, texts=[self.text_column], needed=())


class EmbedSettings(ExtractorConfig):
    """The extractor, and what does not decide its features."""

    batch_size: int = Field(32, ge=1, description="images or captions embedded at once")
    scores_only: bool = Field(
        False, description="store the scores alone, without the features (aesthetic)"
    )
    duplicates: float | None = Field(
        None,
        gt=0,
        le=1,
        description="also write the column `duplicate`: the largest cosine with a row of a smaller key, "
        "where it reaches this bound, else 0",
    )

    @model_validator(mode="after")
    def _has_scores(self) -> EmbedSettings:
        if self.scores_only and self.duplicates is not None:
            raise ValueError(
                "embed.duplicates compares features, which embed.scores_only leaves out: give one of them"
            )
        if self.scores_only and self.extractor != "aesthetic":
            raise ValueError(
                f"embed.scores_only needs embed.extractor=aesthetic, got {self.extractor}: leave it out"
            )
        return self


class EmbedConfig(Config):
    """All settings of `jobs/embed.py`."""

    data: EmbedData
    embed: EmbedSettings
    actors: ActorConfig = ActorConfig()
    ray: RayConfig = RayConfig()
    dry_run: bool = Field(False, description=DRY_RUN)
    estimate: EstimateConfig = EstimateConfig()

    @model_validator(mode="after")
    def _texts_or_images(self) -> EmbedConfig:
        if self.embed.extractor != "clip-text" and self.data.text_column is not None:
            raise ValueError(
                "data.text_column belongs to embed.extractor=clip-text, got "
                f"embed.extractor={self.embed.extractor}: leave it out"
            )
        return self
