"""Pretrains the CLIP text encoder with the contrastive loss of CLIP (Radford et al. 2021).

A small convolutional image tower on the VAE's latents is discarded afterwards. The text encoder learns
words, their binding and their order at a twentieth of the cost of a UNet step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.pretraining.fitting import Fitted, Pictures, fit
from pipelines.tiny_world.scenes import caption
from vlv_model.text_encoder import prompt_ids

BATCH_SIZE = 256
TEMPERATURE = 0.05


def train_text_encoder(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    pictures: Pictures,
    steps: int,
    seed: int,
) -> Fitted:
    """Train in place on the scaled latents `[n c 8 8]` of `pictures` and their captions."""
    width = text_encoder.config.hidden_size
    tokens = caption_ids(tokenizer, pictures)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image_tower = _image_tower(latents.shape[1], width)
        text_head = nn.Linear(width, width)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(pictures.count, (BATCH_SIZE,), generator=generator)
        # The end of text is where a causal encoder has read everything.
        text_features = text_head(text_encoder(tokens[rows]).pooler_output)
        image_features = image_tower(latents[rows])
        scores = (
            F.normalize(text_features, dim=-1) @ F.normalize(image_features, dim=-1).T / TEMPERATURE
        )
        # Pictures of one scene are no wrong answers to each other.
        target = (tokens[rows][:, None] == tokens[rows][None]).all(-1).float()
        target = target / target.sum(dim=1, keepdim=True)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    models = [text_encoder, image_tower, text_head]
    return fit("text encoder", models, loss_of, steps=steps, learning_rate=2e-3, seed=seed)


def caption_ids(tokenizer: CLIPTokenizer, pictures: Pictures) -> Tensor:
    """Token ids of all captions for the text encoder, int64 `[n positions]`."""
    captions = [caption(scene) for scene in pictures.scenes]
    return prompt_ids(tokenizer, captions, tokenizer.model_max_length)


def _image_tower(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 64, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(64, 96, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(96, 96, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(96 * 4 * 4, width),
    )
