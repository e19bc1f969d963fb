"""Settings of reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipelines.estimate.config import DRY_RUN, EstimateConfig
from pipelines.execution.connection import RayConfig
from pipelines.execution.image_job import ActorConfig
from pipelines.execution.model import ModelSettings
from pipelines.images.selection import Selection
from vlv_model.config import Config
from vlv_model.errors import ConfigError


class DiffusionConfig(Config):
    """Sampling of images from the frozen diffusion decoder."""

    num_steps: int = Field(50, ge=1, le=1000, description="denoising steps")
    guidance_scale: float = Field(2.0, ge=0, description="classifier-free guidance; 1: none")
    sampler: Literal["ddpm", "ddim", "euler"] = Field(
        "ddpm",
        description="ddpm (ancestral) or ddim; SD 3.5 has euler alone, which is its default",
    )
    seed: int = Field(
        42, ge=0, lt=2**63, description="seed of the noise, mixed with each image's key"
    )
    batch_size: int = Field(16, ge=1, description="images sampled at once")

    def for_samplers(self, samplers: Sequence[str]) -> DiffusionConfig:
        """These settings with one of a decoder's `samplers`, the first if none was set.

        Raises ConfigError for another one.
        """
        sampler = self.sampler if "sampler" in self.model_fields_set else samplers[0]
        if sampler not in samplers:
            raise ConfigError(
                f"diffusion.sampler={sampler}: this diffusion model has {' and '.join(samplers)}"
            )
        return self.model_copy(update={"sampler": sampler})


class ReconstructConfig(Config):
    """All settings of `jobs/reconstruct.py`."""

    data: Selection
    model: ModelSettings = ModelSettings()
    diffusion: DiffusionConfig = DiffusionConfig()
    side_by_side: bool = Field(
        False,
        description="also write <data.output>/_side_by_side/<key>.png, original left and "
        "reconstruction right; can be added to a finished table",
    )
    actors: ActorConfig = ActorConfig()
    ray: RayConfig = RayConfig()
    dry_run: bool = Field(False, description=DRY_RUN)
    estimate: EstimateConfig = EstimateConfig()
