"""The frozen diffusion decoder: VAE, UNet and noise schedule of Stable Diffusion.

Stage 1 uses its loss, whose gradient passes through the UNet into the conditioning. Pictures are
sampled with classifier-free guidance (Ho & Salimans 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from vlv_model.errors import ModelError
from vlv_model.freezing import freeze
from vlv_model.latents import LatentFormat, posterior
from vlv_model.preprocessing import pixels_from_vae

Sampler = Literal["ddpm", "ddim"]


class DiffusionDecoder(nn.Module):
    """Frozen VAE and UNet. Latents are float32 `[b c h w]`, c=4 and h=w=s/8 for an s x s image.

    Built with a LatentFormat instead of a VAE it computes losses of given latents, but neither
    encodes nor generates pictures.
    """

    def __init__(
        self,
        vae: AutoencoderKL | LatentFormat,
        unet: UNet2DConditionModel,
        noise_scheduler: DDPMScheduler,
        image_size: int,
    ) -> None:
        super().__init__()
        self.vae = None if isinstance(vae, LatentFormat) else vae
        self.latent_format = vae if isinstance(vae, LatentFormat) else LatentFormat.of(vae.config)
        self.unet = unet
        self.noise_scheduler = noise_scheduler
        self.image_size = image_size
        self._check_parts()
        freeze(self)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image's latents."""
        return self.latent_format.shape(self.image_size)

    @property
    def num_timesteps(self) -> int:
        """Length of the noise schedule: `timesteps` are in [0, num_timesteps)."""
        return self.noise_scheduler.config.num_train_timesteps

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Squares `[b 3 s s]`, uint8 or float in [-1, 1] -> sampled, scaled latents `[b c h w]`.

        `posterior_noise` `[b c h w]` is the sampling noise: zeros give the posterior mean. By default
        it is drawn from the device's global generator, as in `latent_dist.sample()`.
        """
        mean, deviation = posterior(self._required_vae(), pixel_values)
        noise = posterior_noise
        if noise is None:
            # Not randn_like: it fills in the order of the strides of `mean`, which is a slice.
            noise = torch.randn(mean.shape, device=mean.device, dtype=mean.dtype)
        return self.latent_format.sample(mean, deviation, noise)

    def loss(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, clip_embeddings: Tensor
    ) -> Tensor:
        """Mean squared error of the UNet's output, a float32 scalar.

        latents, noise `[b c h w]` · timesteps int64 `[b]` · clip_embeddings `[b q d]`, or `[1 q d]`
        for all rows. The target is the noise, or the velocity if the scheduler's `prediction_type`
        is `v_prediction` (Salimans & Ho 2022).
        """
        noise = noise.to(latents)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        noise_pred = self._predict(noisy_latents, timesteps, clip_embeddings)
        return F.mse_loss(noise_pred.float(), target.float())

    @torch.no_grad()
    def generate(
        self,
        clip_embeddings: Tensor,
        unconditional: Tensor,
        generators: Sequence[torch.Generator],
        guidance_scale: float = 2.0,
        num_steps: int = 50,
        scheduler: Sampler = "ddpm",
    ) -> Tensor:
        """Sample pictures: CLIP embeddings `[b q d]` -> uint8 `[b 3 s s]`.

        `unconditional` `[1 n d]` are the empty prompt's CLIP embeddings. `generators` has one
        generator per row, on the model's device or the CPU: a row's picture does not depend on its
        batch. `ddpm` is ancestral sampling; `ddim` is deterministic after the initial noise. Raises
        ValueError for another number of generators, ModelError without a VAE.
        """
        vae, batch = self._required_vae(), clip_embeddings.shape[0]
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators for {batch} rows: give one per row")
        kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[scheduler]
        sampler = kind.from_config(self.noise_scheduler.config)
        sampler.set_timesteps(num_steps, device=clip_embeddings.device)
        latents = self._noise(generators).to(clip_embeddings.device) * sampler.init_noise_sigma
        unconditional = unconditional.expand(batch, -1, -1)
        for t in sampler.timesteps:
            # Two passes: the empty prompt has 77 positions, there may be fewer queries.
            conditional_pred = self._predict(latents, t, clip_embeddings).float()
            unconditional_pred = self._predict(latents, t, unconditional).float()
            guidance = conditional_pred - unconditional_pred
            noise_pred = unconditional_pred + guidance_scale * guidance
            latents = sampler.step(noise_pred, t, latents, generator=list(generators)).prev_sample
        latents = latents / self.latent_format.scaling_factor
        return pixels_from_vae(vae.decode(latents.to(vae.dtype)).sample)

    def _predict(self, noisy_latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        batch, dtype = noisy_latents.shape[0], self.unet.dtype
        condition = condition.expand(batch, -1, -1).to(dtype)
        return self.unet(noisy_latents.to(dtype), timesteps, encoder_hidden_states=condition).sample

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        rows = [torch.randn(self.latent_shape, generator=g, device=g.device) for g in generators]
        return torch.stack(rows)

    def _required_vae(self) -> AutoencoderKL:
        if self.vae is None:
            raise ModelError("this diffusion decoder was built without a VAE: build it with one")
        return self.vae

    def _check_parts(self) -> None:
        channels, *_ = self.latent_shape
        if channels != self.unet.config.in_channels:
            raise ModelError(
                f"the VAE has {channels} latent channels, the UNet expects "
                f"{self.unet.config.in_channels}: take both from one diffusion model"
            )
        prediction_type = self.noise_scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the scheduler's prediction_type is '{prediction_type}', expected 'epsilon' or "
                "'v_prediction': choose a diffusion model with one of these"
            )
