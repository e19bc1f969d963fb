"""Settings of precomputing latents."""

from __future__ import annotations

from pydantic import Field

from pipelines.estimate.config import DRY_RUN, EstimateConfig
from pipelines.execution.connection import RayConfig
from pipelines.execution.image_job import ActorConfig
from pipelines.execution.model import ModelSettings
from pipelines.images.selection import Selection
from vlv_model.config import Config, Precision


class EncodeConfig(Config):
    """Encoding by the VAE."""

    batch_size: int = Field(32, ge=1, description="images encoded at once")
    precision: Precision = Field(
        "float32", description="compute precision of the VAE; latents are stored in bfloat16"
    )


class PrecomputeConfig(Config):
    """All settings of `jobs/precompute.py`."""

    data: Selection
    model: ModelSettings = ModelSettings()
    encode: EncodeConfig = EncodeConfig()
    actors: ActorConfig = ActorConfig()
    ray: RayConfig = RayConfig()
    dry_run: bool = Field(False, description=DRY_RUN)
    estimate: EstimateConfig = EstimateConfig()
