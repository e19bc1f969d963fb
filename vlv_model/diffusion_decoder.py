"""The frozen diffusion decoder: VAE, denoiser and noise schedule.

Stage 1 uses its loss, whose gradient passes through the denoiser into the conditioning. Pictures are
sampled with classifier-free guidance (Ho & Salimans 2022). `DiffusionDecoder` is Stable Diffusion
2.1's; `vlv_model.sdxl` and `vlv_model.sd3` replace the methods in which the others differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from vlv_model.conditions import Condition
from vlv_model.errors import ModelError
from vlv_model.freezing import freeze
from vlv_model.latents import LatentFormat, posterior
from vlv_model.preprocessing import pixels_from_vae

Sampler = Literal["ddpm", "ddim", "euler"]


class DiffusionDecoder(nn.Module):
    """Frozen VAE and denoiser. Latents are float32 `[b c h w]`, h=w=s/8 for an s x s image.

    Built with a LatentFormat instead of a VAE it computes losses of given latents, but neither
    encodes nor generates pictures. What a denoiser is conditioned on is a Condition; a tensor
    `[b n d]` stands for one without a pooled vector.
    """

    denoiser_part: ClassVar[str] = "unet"
    samplers: ClassVar[dict[Sampler, Any]] = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
    preview_sampler: ClassVar[Sampler] = "ddim"  # the best of them in few steps
    denoiser_name: ClassVar[str] = "UNet"
    unet: UNet2DConditionModel

    def __init__(
        self,
        vae: AutoencoderKL | LatentFormat,
        denoiser: nn.Module,
        noise_scheduler: Any,
        image_size: int,
    ) -> None:
        super().__init__()
        self.vae = None if isinstance(vae, LatentFormat) else vae
        self.latent_format = vae if isinstance(vae, LatentFormat) else LatentFormat.of(vae.config)
        self.add_module(self.denoiser_part, denoiser)
        self.noise_scheduler = noise_scheduler
        self.image_size = image_size
        self._check_parts()
        freeze(self)

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        return getattr(self, self.denoiser_part)

    @property
    def pretrained_parts(self) -> dict[str, nn.Module]:
        """The pretrained models by part."""
        parts = {self.denoiser_part: self.denoiser}
        return parts if self.vae is None else {**parts, "vae": self.vae}

    @property
    def condition_width(self) -> int:
        """Width of the embeddings that the denoiser attends to."""
        return self.unet.config.cross_attention_dim

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image's latents."""
        return self.latent_format.shape(self.image_size)

    @property
    def num_timesteps(self) -> int:
        """Length of the noise schedule: `timesteps` are in [0, num_timesteps)."""
        return self.noise_scheduler.config.num_train_timesteps

    def draw_timestep(self, generator: torch.Generator) -> Tensor:
        """A timestep of training, a scalar: int64, uniform."""
        return torch.randint(self.num_timesteps, (), generator=generator)

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
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        clip_embeddings: Condition | Tensor,
    ) -> Tensor:
        """Mean squared error of the denoiser's output, a float32 scalar.

        latents, noise `[b c h w]` · timesteps `[b]` as `draw_timestep` gives them · clip_embeddings:
        a condition of `b` rows, or of one for all of them.
        """
        noisy_latents, target = self.noisy_and_target(latents, noise.to(latents), timesteps)
        predicted = self.predict(noisy_latents, timesteps, Condition.of(clip_embeddings))
        return F.mse_loss(predicted.float(), target.float())

    def noisy_and_target(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The denoiser's input at these timesteps, and what its output is compared with.

        The target is the noise, or the velocity if the scheduler's `prediction_type` is
        `v_prediction` (Salimans & Ho 2022).
        """
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            return noisy_latents, self.noise_scheduler.get_velocity(latents, noise, timesteps)
        return noisy_latents, noise

    @torch.no_grad()
    def generate(
        self,
        clip_embeddings: Condition | Tensor,
        unconditional: Condition | Tensor,
        generators: Sequence[torch.Generator],
        guidance_scale: float = 2.0,
        num_steps: int = 50,
        scheduler: Sampler | None = None,
    ) -> Tensor:
        """Sample pictures from a condition of b rows -> uint8 `[b 3 s s]`.

        `unconditional` has one row. `generators` has one generator per row, on the model's device or
        the CPU: a row's picture does not depend on its batch. `ddpm` is ancestral sampling; `ddim` and
        `euler` are deterministic after the initial noise; the default is the first of `samplers`.
        Raises ValueError for another number of generators, ModelError without a VAE or for a sampler
        that this decoder does not have.
        """
        condition, vae = Condition.of(clip_embeddings), self._required_vae()
        batch, device = len(condition.embeddings), condition.embeddings.device
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators for {batch} rows: give one per row")
        sampler = self._sampler(scheduler)
        sampler.set_timesteps(num_steps, device=device)
        latents = self._noise(generators).to(device) * getattr(sampler, "init_noise_sigma", 1.0)
        empty = Condition.of(unconditional)
        for t in sampler.timesteps:
            # Two passes: the empty prompt has 77 positions, there may be fewer queries.
            conditional_pred = self.predict(latents, t, condition).float()
            unconditional_pred = self.predict(latents, t, empty).float()
            guidance = conditional_pred - unconditional_pred
            noise_pred = unconditional_pred + guidance_scale * guidance
            latents = sampler.step(noise_pred, t, latents, generator=list(generators)).prev_sample
        latents = self.latent_format.unscale(latents)
        return pixels_from_vae(vae.decode(latents.to(vae.dtype)).sample)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output `[b c h w]`.

        timesteps: `[b]` or a scalar · condition: of b rows, or of one for all of them.
        """
        dtype = self.unet.dtype
        embeddings = condition.expand(len(noisy_latents)).embeddings.to(dtype)
        return self.unet(
            noisy_latents.to(dtype), timesteps, encoder_hidden_states=embeddings
        ).sample

    def _sampler(self, name: Sampler | None) -> Any:
        name = name or next(iter(self.samplers))
        if name not in self.samplers:
            raise ModelError(
                f"this diffusion model has no sampler '{name}': choose one of "
                f"{', '.join(self.samplers)}"
            )
        return self.samplers[name].from_config(self.noise_scheduler.config)

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        rows = [torch.randn(self.latent_shape, generator=g, device=g.device) for g in generators]
        return torch.stack(rows)

    def _required_vae(self) -> AutoencoderKL:
        if self.vae is None:
            raise ModelError("this diffusion decoder was built without a VAE: build it with one")
        return self.vae

    def _check_parts(self) -> None:
        channels, *_ = self.latent_shape
        expected, name = self.denoiser.config.in_channels, type(self).denoiser_name
        if channels != expected:
            raise ModelError(
                f"the VAE has {channels} latent channels, the {name} expects "
                f"{expected}: take both from one diffusion model"
            )
        self._check_schedule()

    def check_text_encoder(self, width: int, pooled_width: int) -> None:
        """Raise ModelError unless the denoiser takes conditions of these widths."""
        if width != self.condition_width:
            raise ModelError(
                f"the text encoder is {width} wide, the {self.denoiser_name} attends to "
                f"{self.condition_width}: take both from one diffusion model"
            )

    def _check_schedule(self) -> None:
        prediction_type = self.noise_scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the scheduler's prediction_type is '{prediction_type}', expected 'epsilon' or "
                "'v_prediction': choose a diffusion model with one of these"
            )
