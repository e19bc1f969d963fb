"""Settings of precomputing latents."""

from __future__ import annotations

from pydantic import Field

from pipelines.execution.connection import RayConfig
from pipelines.execution.image_job import ActorConfig
from pipelines.execution.model import ModelSettings
from pipelines.images.selection import Selection
from vlv_model.config import Config, Precision


class EncodeConfig(Config):
    """How the VAE is run."""

    batch_size: int = Field(32, ge=1, description="images that are encoded at once")
    precision: Precision = Field(
        "float32", description="arithmetic of the VAE; what is stored is bfloat16 either way"
    )


class PrecomputeConfig(Config):
    """Everything that `jobs/precompute.py` needs to know."""

    data: Selection
    model: ModelSettings = ModelSettings()
    encode: EncodeConfig = EncodeConfig()
    actors: ActorConfig = ActorConfig()
    ray: RayConfig = RayConfig()
