"""Settings of recaptioning, of a table and of one image."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from pipelines.cli.config import InputPath, InputPathOrUrl
from pipelines.execution.connection import RayConfig
from pipelines.execution.image_job import ActorConfig
from pipelines.execution.model import ModelSettings
from pipelines.images.conditions import Where, small_columns
from pipelines.images.rows import require_columns
from pipelines.images.selection import Selection
from pipelines.recaption.gate import GateConfig
from pipelines.recaption.postprocess import RULES, reference
from pipelines.storage.parquet import open_parquet
from pipelines.storage.tables import parquet_files
from vlv_model.config import Config, Precision


class GenerateConfig(Config):
    """How captions are decoded. All but `batch_size` is part of a caption's fingerprint."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what decodes: this package upon transformers, or vLLM (CUDA; not yet run on a GPU)",
    )
    num_beams: int = Field(4, ge=1, description="beams of the search; 1 is greedy")
    early_stopping: bool = Field(
        False,
        description="the search ends when num_beams captions have ended, as the published "
        "implementation's does; false: when no better one can come",
    )
    max_new_tokens: int = Field(300, ge=1, description="a caption is cut at this many tokens")
    batch_size: int = Field(64, ge=1, description="images that are captioned at once")
    precision: Precision = Field("float32", description="arithmetic")
    temperature: float | None = Field(
        None,
        gt=0,
        le=10,
        description="draw tokens at this temperature, with num_beams=1, in place of the most probable "
        "ones; what is drawn follows from seed and key alone",
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw among the most probable tokens with this share together"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="another seed draws other captions")
    postprocess: Literal["none", "reference"] = Field(
        "none",
        description="reference: of a model that never learned to stop; cut the caption after its last "
        "full stop and drop sentences that were said before",
    )

    @model_validator(mode="after")
    def _draws_or_searches(self) -> GenerateConfig:
        if self.temperature is not None and self.num_beams > 1:
            raise ValueError(
                f"temperature={self.temperature:g} draws one caption, num_beams={self.num_beams} "
                "searches for the most probable one: set num_beams=1, or leave temperature out"
            )
        if self.engine == "vllm" and self.num_beams > 1:
            raise ValueError(
                f"engine=vllm has no beam search over embeddings, num_beams={self.num_beams}: set "
                "num_beams=1"
            )
        if self.early_stopping and self.num_beams == 1:
            raise ValueError(
                "early_stopping needs num_beams of at least 2: one beam does not search"
            )
        if self.temperature is None and (self.top_p < 1 or self.seed):
            raise ValueError("top_p and seed need a temperature")
        return self

    @property
    def draws(self) -> dict[str, Any] | None:
        """temperature, top_p and seed where captions are drawn."""
        if self.temperature is None:
            return None
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}

    def finished(self, text: str) -> str:
        """The caption that is handed out for what was decoded."""
        return reference(text) if self.postprocess == "reference" else text

    def decides(self) -> dict[str, Any]:
        """What captions follow from. Of an option that is not in use nothing is said, so that a
        version with more options gives the same captions the same fingerprint.

        Not the batch size: beyond rounding, which a device or a library's version changes as well,
        no caption depends on what else is decoded beside it.
        """
        decisive = self.model_dump(include={"num_beams", "max_new_tokens", "precision"})
        if self.precision == "bfloat16":  # whose angles were rounded, too, before
            decisive["precision"] = "bfloat16 2"
        decisive |= self.draws or {}
        if self.early_stopping:
            decisive["early_stopping"] = True
        if self.postprocess != "none":
            decisive["postprocess"] = f"{self.postprocess} {RULES}"
        if self.engine != "transformers":  # which rounds, and draws, in ways of its own
            decisive["engine"] = self.engine
        return decisive


class EarlierConfig(Config):
    """An earlier caption table, of whose images only some are to be captioned again."""

    captions: InputPathOrUrl | None = Field(
        None,
        description="caption table, also one that did not pass its gates; same keys as data.input",
    )
    where: str | None = Field(
        None,
        description="caption again what this SQL condition on its columns holds for, as in "
        "\"truncated or repetition >= 0.35 or status like 'caption:%'\"",
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> EarlierConfig:
        if (self.captions is None) != (self.where is None):
            raise ValueError("captions and where go together: give both, or neither")
        return self

    def keys(self) -> np.ndarray:
        """Keys int64 `[n]` of the rows that the condition holds for; in memory, nothing else is."""
        assert self.captions is not None
        assert self.where is not None
        condition, found = Where(self.where, "earlier.where"), [np.zeros(0, np.int64)]
        for file in parquet_files(self.captions, "earlier.captions", published=False):
            with open_parquet(file) as parquet:
                require_columns(parquet.schema_arrow, ["key"], str(file))
                for batch in parquet.iter_batches(columns=small_columns(parquet.schema_arrow)):
                    rows = pa.Table.from_batches([batch])
                    found.append(rows["key"].to_numpy()[condition.mask(rows)])
        return np.concatenate(found)


class RecaptionConfig(Config):
    """Everything that `jobs/recaption.py` needs to know."""

    data: Selection
    earlier: EarlierConfig = EarlierConfig()
    model: ModelSettings = ModelSettings()
    generate: GenerateConfig = GenerateConfig()
    gate: GateConfig = GateConfig()
    actors: ActorConfig = ActorConfig()
    ray: RayConfig = RayConfig()
    format: Literal["parquet", "json"] = Field(
        "parquet",
        description='json: beside the table also captions.json, one object of {"file name": "caption"}',
    )
    join: bool = Field(False, description="put each image into its caption's row")
    license: str = Field(
        "other", min_length=1, description="licence of the dataset card, as the hub names it"
    )


class CaptionConfig(Config):
    """Everything that `jobs/caption.py` needs to know."""

    image: InputPath = Field(description="image file")
    model: ModelSettings = ModelSettings()
    generate: GenerateConfig = GenerateConfig()
    use_gpu: bool | None = Field(None, description="run on a CUDA GPU; default: if there is one")
