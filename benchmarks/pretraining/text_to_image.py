"""Pretrains the diffusion model: captions of training scenes to the latents of their images.

The UNet starts from random weights; the CLIP text encoder is pretrained and trained further.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.pretraining.fitting import Fitted, Pictures, fit
from benchmarks.pretraining.text_encoder import caption_ids
from vlv_model.text_encoder import prompt_ids

EMPTY = 0.1  # share of captions that are left out, for classifier-free guidance
BATCH_SIZE = 64


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
    """Train text encoder and UNet in place, on the scaled latents `[n c 8 8]` of `pictures`."""
    captions = caption_ids(tokenizer, pictures)
    empty = prompt_ids(tokenizer, [""], tokenizer.model_max_length)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(pictures.count, (BATCH_SIZE,), generator=generator)
        is_empty = torch.rand(BATCH_SIZE, 1, generator=generator) < EMPTY
        tokens = torch.where(is_empty, empty, captions[rows])
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
