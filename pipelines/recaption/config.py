"""Settings of recaptioning, of a table and of one image."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.config import InputPath
from pipelines.recaption.gate import GateConfig
from pipelines.runtime import RayConfig
from pipelines.selection import ActorConfig, Selection
from pipelines.training.model import ModelSettings
from vlv_model.config import Config


class GenerateConfig(Config):
    """How captions are decoded. All but `batch_size` is part of a caption's fingerprint."""

    num_beams: int = Field(4, ge=1, description="beams of the search; 1 is greedy")
    max_new_tokens: int = Field(300, ge=1, description="a caption is cut at this many tokens")
    batch_size: int = Field(64, ge=1, description="images that are captioned at once")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="arithmetic")


class RecaptionConfig(Config):
    """Everything that `jobs/recaption.py` needs to know."""

    data: Selection
    model: ModelSettings = ModelSettings()
    generate: GenerateConfig = GenerateConfig()
    gate: GateConfig = GateConfig()
    actors: ActorConfig = ActorConfig()
    ray: RayConfig = RayConfig()


class CaptionConfig(Config):
    """Everything that `jobs/caption.py` needs to know."""

    image: InputPath = Field(description="image file")
    model: ModelSettings = ModelSettings()
    generate: GenerateConfig = GenerateConfig()
    use_gpu: bool | None = Field(None, description="run on a CUDA GPU; default: if there is one")
