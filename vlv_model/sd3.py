"""SD 3 and 3.5's decoder: a transformer trained by rectified flow (arXiv 2403.03206).

Latents move on straight lines from pictures to noise, x_t = (1 - s) x + s e for s in (0, 1), and
the transformer predicts the velocity e - x. The loss weighs all times equally; they are drawn
logit-normal: s = sigmoid(n), n standard normal, then shifted to `k s / (1 + (k - 1) s)` by
`time_shift` k (1: unshifted, the paper's choice at low resolutions; 3: that of the published sampler).
diffusers' own example differs in both. It takes times from the sampler's shifted table, and by default
it compares estimates of x, which multiplies the loss by s squared.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor

from vlv_model.conditions import Condition
from vlv_model.diffusion_decoder import DiffusionDecoder, Sampler
from vlv_model.errors import ModelError

T5_POSITIONS = 256
"""Positions of T5's embeddings, which are zeros: diffusers' default `max_sequence_length`."""


class SD3Decoder(DiffusionDecoder):
    """Frozen VAE and transformer; timesteps are 1000 s, float32."""

    denoiser_part: ClassVar[str] = "transformer"
    denoiser_name: ClassVar[str] = "transformer"
    samplers: ClassVar[dict[Sampler, Any]] = {"euler": FlowMatchEulerDiscreteScheduler}
    preview_sampler: ClassVar[Sampler] = "euler"
    transformer: SD3Transformer2DModel
    time_shift: float = 1.0

    @property
    def condition_width(self) -> int:
        """Width of the joint embeddings: the CLIPs' are padded to it, T5's fill it."""
        return self.transformer.config.joint_attention_dim

    def draw_timestep(self, generator: torch.Generator) -> Tensor:
        """A timestep of training, a float32 scalar in (0, 1000): logit-normal, then shifted."""
        sigma = torch.randn((), generator=generator).sigmoid()
        shifted = self.time_shift * sigma / (1 + (self.time_shift - 1) * sigma)
        return shifted * self.num_timesteps

    def noisy_and_target(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A point on the line from latents to noise, and the line's velocity."""
        sigma = (timesteps / self.num_timesteps).to(latents).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, noise - latents

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The transformer's velocity `[b c h w]`; `condition` needs its pooled vector `[b 2048]`."""
        rows, dtype = len(noisy_latents), self.transformer.dtype
        given = condition.expand(rows)
        if given.pooled is None:
            raise ModelError("SD 3 reads a pooled vector: give a Condition that has one")
        return self.transformer(
            hidden_states=noisy_latents.to(dtype),
            encoder_hidden_states=self.joint_embeddings(given.embeddings).to(dtype),
            pooled_projections=given.pooled.to(dtype),
            timestep=timesteps.expand(rows),
        ).sample

    def joint_embeddings(self, embeddings: Tensor) -> Tensor:
        """The CLIPs' embeddings `[b n 2048]` -> what the transformer attends to, `[b n+256 4096]`.

        Padded with zeros to the full width, then T5's 256 positions. SD 3 was trained to do without
        T5, whose place is zeros as in diffusers; embeddings of a T5 would stand here.
        """
        padded = F.pad(embeddings, (0, self.condition_width - embeddings.shape[-1]))
        t5 = padded.new_zeros(len(padded), T5_POSITIONS, self.condition_width)
        return torch.cat([padded, t5], dim=1)

    def check_text_encoder(self, width: int, pooled_width: int) -> None:
        """Raise ModelError unless the transformer takes conditions of these widths."""
        expected = self.transformer.config.pooled_projection_dim
        if width > self.condition_width or pooled_width != expected:
            raise ModelError(
                f"the text encoders' embeddings are {width} wide and their pooled vectors "
                f"{pooled_width}, the transformer reads at most {self.condition_width}, and "
                f"{expected}: take both from one diffusion model"
            )

    def _check_schedule(self) -> None:
        _, side, _ = self.latent_shape
        patch, most = self.transformer.config.patch_size, self.transformer.config.pos_embed_max_size
        if side % patch or side // patch > most:
            factor = self.latent_format.factor * patch
            raise ModelError(
                f"image_size is {self.image_size}: choose a multiple of {factor} up to "
                f"{factor * most} for this transformer"
            )
        if self.noise_scheduler.config.get("use_dynamic_shifting"):
            raise ModelError(
                "the scheduler has use_dynamic_shifting, expected a fixed shift: choose SD 3 or 3.5's"
            )
