"""The VLV auto-encoder (stage 1): image -> caption embeddings -> frozen decoder -> image.

Trained on images alone: the frozen diffusion model denoises an image, conditioned on the encoder's
caption embeddings of it. (arXiv 2507.07104, stage 1)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlv_model.checkpoints import loading
from vlv_model.checkpoints.weights import load_checkpoint
from vlv_model.clip_pair import ClipPair
from vlv_model.conditions import Condition
from vlv_model.config import Precision, TimeIds
from vlv_model.diffusion_decoder import DiffusionDecoder, Sampler
from vlv_model.encoder import VLVEncoder
from vlv_model.freezing import evaluating
from vlv_model.latents import LatentFormat
from vlv_model.preprocessing import pixels_from_vae
from vlv_model.sdxl import time_ids_of
from vlv_model.text_encoder import TextEncoder


class VLVAutoEncoder(nn.Module):
    """Encoder (trainable), text encoder and diffusion decoder (both frozen)."""

    ignored_parts = VLVEncoder.ignored_parts
    new_parts = tuple(f"encoder.{part}" for part in VLVEncoder.new_parts)
    trained_parts = tuple(f"encoder.{part}" for part in VLVEncoder.trained_parts)

    def __init__(
        self,
        encoder: VLVEncoder,
        text_encoder: TextEncoder | ClipPair,
        diffusion_decoder: DiffusionDecoder,
        *,
        time_ids: TimeIds = "square",
    ) -> None:
        super().__init__()
        text_encoder.check_queries(encoder.num_queries)
        diffusion_decoder.check_text_encoder(text_encoder.width, text_encoder.pooled_width)
        self.encoder = encoder
        self.text_encoder = text_encoder
        self.diffusion_decoder = diffusion_decoder
        self.time_ids = time_ids

    @property
    def base_parts(self) -> tuple[str, ...]:
        """The pretrained parts with weights that its training depends on."""
        denoiser = self.diffusion_decoder.denoiser_part
        return ("florence", *self.text_encoder.pretrained_parts, denoiser, "vae")

    @classmethod
    def from_pretrained(
        cls,
        model: loading.Model | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        with_vae: bool = True,
        precision: Precision = "float32",
        verify: bool = True,
        **parts: Any,
    ) -> VLVAutoEncoder:
        """Build from pretrained parts, then load the trained weights, if any, strictly.

        `model` is a ModelConfig, a folder with model.json, or a checkpoint folder (a stage-2
        checkpoint gives its encoder); `parts` are fields of ModelConfig that override it. Without
        the VAE the model trains on `latents` and generates no pictures. Returned in `precision`,
        on the CPU, in eval mode. `verify=False` skips the digest checks. Raises ModelError or
        CheckpointError.
        """
        config, checkpoint = loading.resolve_checkpoint(model, checkpoint, parts)
        encoder = VLVEncoder.from_pretrained(config, precision=precision)
        text_encoder = loading.load_text_encoders(config, precision)
        decoder = loading.load_decoder(config, precision, with_vae=with_vae)
        autoencoder = cls(encoder, text_encoder, decoder, time_ids=config.time_ids).eval()
        if checkpoint is not None:
            load_checkpoint(checkpoint, autoencoder, model=config, verify=verify)
        return autoencoder

    @property
    def latent_format(self) -> LatentFormat:
        """Channels, downsampling factor and scale of the VAE's latents."""
        return self.diffusion_decoder.latent_format

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image's latents: the shape of `noise` without its batch."""
        return self.diffusion_decoder.latent_shape

    @property
    def num_timesteps(self) -> int:
        """Length of the noise schedule: `timesteps` are in [0, num_timesteps)."""
        return self.diffusion_decoder.num_timesteps

    def draw_timestep(self, generator: torch.Generator) -> Tensor:
        """A timestep of training, a scalar."""
        return self.diffusion_decoder.draw_timestep(generator)

    def clip_embeddings(self, pixel_values: Tensor) -> Tensor:
        """uint8 squares `[b 3 s s]` or float encoder pixels `[b 3 e e]` -> `[b q d]`."""
        return self.text_encoder(self.encoder(pixel_values))

    def condition(self, pixel_values: Tensor, original_sizes: Tensor | None = None) -> Condition:
        """Squares or pixels as above -> what the diffusion decoder is conditioned on.

        `original_sizes` int `[b 2]`, height and width of the images before they were cut: read where
        `time_ids` is `original`.
        """
        condition = self.text_encoder.condition(self.encoder(pixel_values))
        if original_sizes is None:
            return condition
        size = self.diffusion_decoder.image_size
        return replace(condition, time_ids=time_ids_of(original_sizes, size))

    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        posterior_noise: Tensor | None = None,
        encoder_pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        original_sizes: Tensor | None = None,
    ) -> Tensor:
        """Stage-1 loss, a float32 scalar.

        pixel_values: squares `[b 3 s s]`, uint8 or float in [-1, 1]
        noise: `[b c h w]` · timesteps: `[b]`, from `draw_timestep`
        posterior_noise: `[b c h w]`, the VAE's sampling noise; zeros give the posterior mean. By
            default it is drawn from the global generator, as in `latent_dist.sample()`.
        encoder_pixel_values: float `[b 3 e e]`, ImageNet-normalised, skips the preprocessing. By
            default the encoder gets the same squares, float ones rounded to uint8.
        latents: `[b c h w]`, scaled, skip the VAE.
        original_sizes: int `[b 2]`, as in `condition`
        """
        if latents is None:
            latents = self.latents(pixel_values, posterior_noise)
        if encoder_pixel_values is None:
            is_uint8 = pixel_values.dtype == torch.uint8
            encoder_pixel_values = pixel_values if is_uint8 else pixels_from_vae(pixel_values)
        condition = self.condition(encoder_pixel_values, original_sizes)
        return self.denoising_loss(latents, noise, timesteps, condition)

    # DeepSpeed and DDP wrap the module and call forward; elsewhere the name says what it returns.
    loss = forward

    def latents(self, pixel_values: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
        """Squares `[b 3 s s]`, uint8 or float in [-1, 1] -> scaled latents `[b c h w]`.

        `posterior_noise` `[b c h w]` as in `loss`.
        """
        return self.diffusion_decoder.encode(pixel_values, posterior_noise)

    def denoising_loss(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        clip_embeddings: Condition | Tensor,
    ) -> Tensor:
        """The loss for a given condition of b rows or one: of images or of prompts."""
        return self.diffusion_decoder.loss(latents, noise, timesteps, clip_embeddings)

    def reconstruct(
        self,
        pixel_values: Tensor,
        generators: Sequence[torch.Generator],
        guidance_scale: float = 2.0,
        num_steps: int = 50,
        scheduler: Sampler | None = None,
    ) -> Tensor:
        """Reconstruct images, uint8 `[b 3 s s]` -> uint8 `[b 3 s s]`; one generator per row."""
        with evaluating(self):
            condition = self.condition(pixel_values)
            return self._generate(condition, generators, guidance_scale, num_steps, scheduler)

    def text_to_image(
        self,
        prompts: list[str],
        generators: Sequence[torch.Generator],
        guidance_scale: float = 2.0,
        num_steps: int = 50,
        scheduler: Sampler | None = None,
    ) -> Tensor:
        """Generate pictures from text -> uint8 `[b 3 s s]`, by the diffusion model alone.

        One generator per row.
        """
        with evaluating(self):
            condition = self.text_encoder.prompt_condition(prompts)
            return self._generate(condition, generators, guidance_scale, num_steps, scheduler)

    def _generate(
        self,
        condition: Condition,
        generators: Sequence[torch.Generator],
        guidance_scale: float,
        num_steps: int,
        scheduler: Sampler | None,
    ) -> Tensor:
        unconditional = self.text_encoder.unconditional()
        return self.diffusion_decoder.generate(
            condition, unconditional, generators, guidance_scale, num_steps, scheduler
        )
