"""Compares conditions by the denoising loss on the same noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlv_model.diffusion_decoder import DiffusionDecoder
from vlv_model.text_encoder import TextEncoder

NUM_TIMESTEPS = 8  # per image, evenly spaced over the schedule
BATCH_SIZE = 64


@torch.no_grad()
def denoising_losses(
    decoder: DiffusionDecoder, latents: Tensor, conditions: Mapping[str, Tensor], seed: int
) -> dict[str, float]:
    """Mean loss of each condition over all timesteps, with fixed noise.

    latents `[n c h w]` · conditions: CLIP embeddings `[n q d]`, or `[1 q d]` for all rows.
    """
    count, step = latents.shape[0], decoder.num_timesteps // NUM_TIMESTEPS
    noise = torch.randn(
        (NUM_TIMESTEPS, *latents.shape), generator=torch.Generator().manual_seed(seed)
    )
    totals = dict.fromkeys(conditions, 0.0)
    for i in range(NUM_TIMESTEPS):
        for rows in torch.arange(count).split(BATCH_SIZE):
            timesteps = torch.full((len(rows),), i * step + step // 2)
            for name, condition in conditions.items():
                embeddings = condition if condition.shape[0] == 1 else condition[rows]
                loss = decoder.loss(latents[rows], noise[i][rows], timesteps, embeddings)
                totals[name] += float(loss) * len(rows)
    return {name: total / (count * NUM_TIMESTEPS) for name, total in totals.items()}


def text_conditions(text_encoder: TextEncoder, captions: list[str]) -> dict[str, Tensor]:
    """CLIP embeddings `[n q d]` of the true captions, of the empty caption `[1 q d]`, and of another
    row's captions `[n q d]`.
    """
    true = text_encoder.encode_prompts(captions)
    return {
        "true_caption": true,
        "no_caption": text_encoder.encode_prompts([""]),
        "wrong_caption": true.roll(1, dims=0),
    }


def gap_closed(losses: Mapping[str, float]) -> float:
    """(no caption - encoder) / (no caption - true caption): 1 if the encoder is as good as the text."""
    gap = losses["no_caption"] - losses["true_caption"]
    return (losses["no_caption"] - losses["encoder"]) / gap
