"""Pretrains the VAE on images of training scenes, with latents of 256 numbers."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.pretraining.fitting import Fitted, Pictures, fit
from vlv_model.freezing import evaluating

KL_WEIGHT = 1e-6  # of a picture's divergence: a smooth but hardly hindered latent space
FOREGROUND_WEIGHT = 6.0  # of a pixel of an object; most pixels are background
BATCH_SIZE = 16


def train_vae(vae: AutoencoderKL, pictures: Pictures, steps: int, seed: int) -> Fitted:
    """Train in place, and set the scaling factor to 1 / standard deviation of the latents."""

    vae.to(memory_format=torch.channels_last)  # a quarter faster on CPUs

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(pictures.count, (BATCH_SIZE,), generator=generator)
        pixels = pictures.vae_pixels(rows)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = _weights(pixels) * (decoded - pixels) ** 2
        return error.mean() + KL_WEIGHT * posterior.kl().mean()

    fitted = fit("VAE", [vae], loss_of, steps=steps, learning_rate=2e-3, seed=seed)
    vae.register_to_config(
        scaling_factor=1.0 / float(encode(vae, pictures, min(1024, pictures.count)).std())
    )
    return fitted


def _weights(pixels: Tensor) -> Tensor:
    """Weight of each pixel's error, `[b 1 h w]`; the upper left corner is always background."""
    background = pixels[:, :, :1, :1]
    is_object = ((pixels - background).abs().amax(dim=1, keepdim=True) > 0.05).float()
    return 1 + (FOREGROUND_WEIGHT - 1) * is_object


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Pictures, count: int | None = None) -> Tensor:
    """Posterior means of the first `count` pictures (default: all), unscaled, `[n c 8 8]`."""
    rows = torch.arange(pictures.count if count is None else count)
    with evaluating(vae):
        return torch.cat(
            [vae.encode(pictures.vae_pixels(part)).latent_dist.mean for part in rows.split(256)]
        )
