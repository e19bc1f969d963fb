"""Latents of the VAE: a distribution per image, and scaled samples of it.

The VAE gives the mean and standard deviation of each latent. They depend only on the image and can
be precomputed; training draws a new sample for every row and epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlv_model.errors import ModelError
from vlv_model.preprocessing import vae_pixels

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class LatentFormat:
    """Shape and scale of a VAE's latents, from its configuration."""

    channels: int
    factor: int  # image side / latent side
    scaling_factor: float  # the diffusion model's latents are (the VAE's - shift) times this
    shift_factor: float = 0.0

    @classmethod
    def of(cls, vae_config: Mapping[str, Any]) -> LatentFormat:
        """From the configuration of an AutoencoderKL."""
        return cls(
            vae_config["latent_channels"],
            2 ** (len(vae_config["block_out_channels"]) - 1),
            vae_config["scaling_factor"],
            vae_config.get("shift_factor") or 0.0,
        )

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """(c, h, w) of one image's latents. Raises ModelError unless `factor` divides the side."""
        if image_size % self.factor:
            raise ModelError(
                f"image_size is {image_size}, the VAE downsamples by {self.factor}: "
                f"choose a multiple of {self.factor}"
            )
        side = image_size // self.factor
        return self.channels, side, side

    def sample(self, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
        """A scaled sample, float32; all `[b c h w]`. Zeros for `noise` give the scaled mean."""
        return self.scale((mean + deviation * noise.to(deviation)).float())

    def scale(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the diffusion model's."""
        return (latents - self.shift_factor) * self.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return latents / self.scaling_factor + self.shift_factor


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Squares `[b 3 s s]`, uint8 or float in [-1, 1] -> mean and std `[b c h w]`, unscaled."""
    if pixel_values.dtype == torch.uint8:
        pixel_values = vae_pixels(pixel_values)
    distribution = vae.encode(pixel_values.to(vae.dtype)).latent_dist
    return distribution.mean, distribution.std
