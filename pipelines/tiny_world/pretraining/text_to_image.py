"""The diffusion model: text about training scenes to the latents of their pictures.

The UNet starts from nothing; the CLIP text encoder has learned from pairs, and goes on learning.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pipelines.tiny_world.pretraining.fitting import Fitted, Pictures, fit
from pipelines.tiny_world.wording import web_text
from vlv_model.text_encoder import prompt_ids

EMPTY = 0.1  # share of texts that are empty, for classifier-free guidance
BATCH_SIZE = 32


def train_text_to_image(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: Tensor,
    pictures: Pictures,
    steps: int,
    seed: int,
) -> Fitted:
    """Train text encoder and UNet in place, on the scaled latents `[n 4 8 8]` of `pictures`."""
    unet.to(memory_format=torch.channels_last)  # a quarter faster on CPUs
    rng = np.random.default_rng(seed)

    def text(row: int) -> str:
        return "" if rng.random() < EMPTY else web_text(pictures.scenes[row], rng)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(pictures.count, (BATCH_SIZE,), generator=generator)
        texts = [text(row) for row in rows.tolist()]
        tokens = prompt_ids(tokenizer, texts, tokenizer.model_max_length)
        condition = text_encoder(tokens).last_hidden_state
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(
            scheduler.config.num_train_timesteps, (BATCH_SIZE,), generator=generator
        )
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = unet(noisy, timesteps, encoder_hidden_states=condition).sample
        return F.mse_loss(predicted, scheduler.get_velocity(clean, noise, timesteps))

    models = [text_encoder, unet]
    return fit("text to image", models, loss_of, steps=steps, learning_rate=1.5e-3, seed=seed)
