"""Settings of recaptioning a table and of captioning one image."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, Field, model_validator

from pipelines.cli.config import InputPathOrUrl, one_or_more
from pipelines.estimate.config import DRY_RUN, EstimateConfig
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

# vLLM raises lower temperatures to the first, in silence, and refuses higher ones than the second.
VLLM_TEMPERATURES = (0.01, 2.0)


class GenerateConfig(Config):
    """Decoding of captions. All settings but `batch_size` are part of a caption's fingerprint."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="decoder of greedy captions and samples: transformers, or vLLM (same captions on "
        "vLLM's CPU build; not yet run on a GPU)",
    )
    num_beams: int = Field(4, ge=1, description="beams of beam search; 1 is greedy decoding")
    early_stopping: bool = Field(
        False,
        description="stop the search once num_beams captions have ended, like the published "
        "implementation; false: once no better caption is possible",
    )
    max_new_tokens: int = Field(300, ge=1, description="captions are cut at this many tokens")
    batch_size: int = Field(64, ge=1, description="images captioned at once")
    precision: Precision = Field("float32", description="compute precision")
    temperature: float | None = Field(
        None,
        gt=0,
        le=10,
        description="sample tokens at this temperature (with num_beams=1) instead of taking the most "
        "probable; samples depend only on seed and key",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: total probability of the tokens sampled from",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of sampling")
    postprocess: Literal["none", "reference"] = Field(
        "none",
        description="reference: for models that never learned to stop; cut captions after the last "
        "full stop and drop repeated sentences",
    )

    @model_validator(mode="after")
    def _samples_or_searches(self) -> GenerateConfig:
        if self.temperature is not None and self.num_beams > 1:
            raise ValueError(
                f"generate.temperature={self.temperature:g} samples, generate.num_beams="
                f"{self.num_beams} searches for the most probable caption: set generate.num_beams=1, or "
                "leave generate.temperature out"
            )
        if self.engine == "vllm" and self.num_beams > 1:
            raise ValueError(
                "generate.engine=vllm has no beam search over embeddings, got generate.num_beams="
                f"{self.num_beams}: set generate.num_beams=1"
            )
        if self.engine == "vllm" and self.temperature is not None:
            least, most = VLLM_TEMPERATURES
            if not least <= self.temperature <= most:
                raise ValueError(
                    f"generate.engine=vllm samples at temperatures of {least:g} to {most:g}, got "
                    f"generate.temperature={self.temperature:g}: set one of these, or leave "
                    "generate.engine out"
                )
        if self.early_stopping and self.num_beams == 1:
            raise ValueError("generate.early_stopping needs generate.num_beams of at least 2")
        if self.temperature is None and (self.top_p < 1 or self.seed):
            raise ValueError("generate.top_p and generate.seed need generate.temperature")
        return self

    @property
    def sampling(self) -> dict[str, Any] | None:
        """temperature, top_p and seed; None without sampling."""
        if self.temperature is None:
            return None
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}

    def postprocessed(self, text: str) -> str:
        """The caption after `postprocess`."""
        return reference(text) if self.postprocess == "reference" else text

    def identity(self) -> dict[str, Any]:
        """The settings that affect captions, for their fingerprint.

        Options that are not in use are left out, so that a later version with more options gives the
        same fingerprint. Batch size is left out, since it affects only rounding, as devices and library
        versions do.
        """
        identity = self.model_dump(include={"num_beams", "max_new_tokens", "precision"})
        if self.precision == "bfloat16":  # earlier versions also rounded the rotary angles
            identity["precision"] = "bfloat16 2"
        identity |= self.sampling or {}
        if self.early_stopping:
            identity["early_stopping"] = True
        if self.postprocess != "none":
            identity["postprocess"] = f"{self.postprocess} {RULES}"
        if self.engine != "transformers":  # vLLM rounds and samples differently
            identity["engine"] = self.engine
        return identity


class EarlierConfig(Config):
    """An earlier caption table, some of whose images are captioned again."""

    captions: InputPathOrUrl | None = Field(
        None,
        description="caption table with the keys of data.input; may have failed its gates",
    )
    where: str | None = Field(
        None,
        description="SQL condition on its columns for the rows to caption again, for example "
        "\"truncated or repetition >= 0.35 or status like 'caption:%'\"",
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> EarlierConfig:
        if (self.captions is None) != (self.where is None):
            raise ValueError(
                "earlier.captions and earlier.where belong together: give both, or neither"
            )
        return self

    def keys(self) -> np.ndarray:
        """Keys int64 `[n]` of the rows that meet the condition; reads the table in batches."""
        assert self.captions is not None
        assert self.where is not None
        condition, keys = Where(self.where, "earlier.where"), [np.zeros(0, np.int64)]
        for file in parquet_files(self.captions, "earlier.captions", published=False):
            with open_parquet(file) as parquet:
                require_columns(parquet.schema_arrow, ["key"], str(file))
                for batch in parquet.iter_batches(columns=small_columns(parquet.schema_arrow)):
                    rows = pa.Table.from_batches([batch])
                    keys.append(rows["key"].to_numpy()[condition.mask(rows)])
        return np.concatenate(keys)


class RecaptionConfig(Config):
    """All settings of `jobs/recaption.py`."""

    data: Selection
    earlier: EarlierConfig = EarlierConfig()
    model: ModelSettings = ModelSettings()
    generate: GenerateConfig = GenerateConfig()
    gate: GateConfig = GateConfig()
    actors: ActorConfig = ActorConfig()
    ray: RayConfig = RayConfig()
    dry_run: bool = Field(False, description=DRY_RUN)
    estimate: EstimateConfig = EstimateConfig()
    format: Literal["parquet", "json"] = Field(
        "parquet",
        description='json: also write captions.json, one object of {"file name": "caption"}',
    )
    join: bool = Field(False, description="add each image to its caption's row")
    license: str = Field(
        "other", min_length=1, description="licence in the dataset card, by its name on the hub"
    )


class CaptionConfig(Config):
    """All settings of `jobs/caption.py`."""

    image: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] = Field(
        (), description="image files, folders of them (at any depth), and globs"
    )
    model: ModelSettings = ModelSettings()
    generate: GenerateConfig = GenerateConfig()
    format: Literal["text", "json"] = Field(
        "text",
        description="text: the caption of one image file, otherwise lines of file, tab and caption "
        '(with \\t, \\n and \\\\ inside them escaped); json: one object of {"file": "caption"}',
    )
    use_gpu: bool | None = Field(None, description="run on a CUDA GPU; default: if available")
