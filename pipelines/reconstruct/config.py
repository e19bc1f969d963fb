"""Settings of reconstructing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.execution.connection import RayConfig
from pipelines.execution.image_job import ActorConfig
from pipelines.execution.model import ModelSettings
from pipelines.images.selection import Selection
from vlv_model.config import Config


class DiffusionConfig(Config):
    """How pictures are sampled from the frozen decoder."""

    num_steps: int = Field(50, ge=1, le=1000, description="denoising steps")
    guidance_scale: float = Field(2.0, ge=0, description="classifier-free guidance; 1 is none")
    sampler: Literal["ddpm", "ddim"] = Field("ddpm", description="ddpm (ancestral) or ddim")
    seed: int = Field(
        42, ge=0, lt=2**63, description="with the image's key, the seed of its picture"
    )
    batch_size: int = Field(16, ge=1, description="pictures that are sampled at once")


class ReconstructConfig(Config):
    """Everything that `jobs/reconstruct.py` needs to know."""

    data: Selection
    model: ModelSettings = ModelSettings()
    diffusion: DiffusionConfig = DiffusionConfig()
    side_by_side: bool = Field(
        False,
        description="write image files, too: <data.output>/_side_by_side/<key>.png, the original "
        "left and its picture right; also of a table that is finished",
    )
    actors: ActorConfig = ActorConfig()
    ray: RayConfig = RayConfig()
