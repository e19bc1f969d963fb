"""SDXL's decoder: a UNet that also reads a pooled vector and six sizes (arXiv 2307.01952)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlv_model.conditions import Condition
from vlv_model.diffusion_decoder import DiffusionDecoder
from vlv_model.errors import ModelError


class SDXLDecoder(DiffusionDecoder):
    """As Stable Diffusion, but each condition has a pooled vector and sizes.

    The sizes (`time_ids`) are height and width of the original image, top and left of the crop, and
    height and width of the square. Without them they are those of an image that is the square itself.
    Pictures are always sampled with these.
    """

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The UNet's output `[b c h w]`; `condition` needs its pooled vector `[b 1280]`."""
        dtype, size = self.unet.dtype, self.image_size
        given = condition.expand(len(noisy_latents))
        if given.pooled is None:
            raise ModelError("SDXL's UNet reads a pooled vector: give a Condition that has one")
        time_ids = given.time_ids
        if time_ids is None:
            square = torch.tensor([[size, size, 0, 0, size, size]], device=noisy_latents.device)
            time_ids = square.expand(len(noisy_latents), -1)
        return self.unet(
            noisy_latents.to(dtype),
            timesteps,
            encoder_hidden_states=given.embeddings.to(dtype),
            added_cond_kwargs={
                "text_embeds": given.pooled.to(dtype),
                "time_ids": time_ids.to(dtype),
            },
        ).sample

    def check_text_encoder(self, width: int, pooled_width: int) -> None:
        """Raise ModelError unless the UNet takes conditions of these widths."""
        super().check_text_encoder(width, pooled_width)
        config = self.unet.config
        sizes = 6 * config.addition_time_embed_dim
        expected = config.projection_class_embeddings_input_dim - sizes
        if pooled_width != expected:
            raise ModelError(
                f"the pooled vector is {pooled_width} wide, the UNet reads {expected}: take both from "
                "one diffusion model"
            )


def time_ids_of(original_sizes: Tensor, size: int) -> Tensor:
    """SDXL's six sizes of images of height and width `original_sizes` `[b 2]` -> int64 `[b 6]`.

    The images were resized until their shorter side was `size`, then cropped in the centre, as
    `vlv_model.squares` does it.
    """
    original = original_sizes.to(torch.float64)
    scale = size / original.min(dim=1, keepdim=True).values
    resized = (original * scale).round().clamp(min=size)
    corner = ((resized - size) / 2).floor().long()
    target = torch.full_like(original_sizes, size)
    return torch.cat([original_sizes, corner, target], dim=1)
