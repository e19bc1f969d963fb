"""Metrics of the pretrained parts on scenes of the validation split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from benchmarks.pretraining import florence
from benchmarks.pretraining.fitting import Pictures
from benchmarks.pretraining.language_model import partial_text
from benchmarks.pretraining.vae import encode
from pipelines.tiny_world.denoising import denoising_losses, text_conditions
from pipelines.tiny_world.scenes import caption
from vlv_model.caption_tokens import IGNORED, tokenize_captions
from vlv_model.checkpoints.loading import load_diffusion, load_text_encoder
from vlv_model.checkpoints.sources import resolve_model
from vlv_model.diffusion_decoder import DiffusionDecoder
from vlv_model.preprocessing import encoder_pixels
from vlv_model.text_encoder import TextEncoder

SPECIAL = (0, 1, 2)  # <s>, <pad>, </s>


@torch.no_grad()
def of_vae(vae: AutoencoderKL, pictures: Pictures) -> dict[str, float]:
    """Root mean squared error of decoded images, on the scale of 0 to 255."""
    decoded = vae.decode(encode(vae, pictures)).sample.clamp(-1, 1)
    error = F.mse_loss(decoded, pictures.vae_pixels(torch.arange(pictures.count)))
    return {"rmse_of_255": float(error.sqrt()) * 127.5}


def of_text_to_image(folder: Path, pictures: Pictures) -> dict[str, float]:
    """Denoising loss with the true caption, the empty caption, and another image's caption."""
    model, _ = resolve_model(folder)
    vae, unet, scheduler = load_diffusion(model)
    decoder = DiffusionDecoder(vae, unet, scheduler, model.image_size)
    text_encoder = TextEncoder(*load_text_encoder(model))
    conditions = text_conditions(text_encoder, [caption(scene) for scene in pictures.scenes])
    latents = encode(vae, pictures) * decoder.latent_format.scaling_factor
    return denoising_losses(decoder, latents, conditions, pictures.seed)


@torch.no_grad()
def of_florence(
    model: Any, tokenizer: Any, image_size: int, pictures: Pictures
) -> dict[str, float]:
    """Next-token accuracy on the target's words, and on its location tokens."""
    right, total = {"labels": 0, "locations": 0}, {"labels": 0, "locations": 0}
    pixels = encoder_pixels(pictures.squares, image_size)
    for task in florence.PROMPTS:
        batch = florence.batch(model, tokenizer, image_size, pictures, task)
        logits = model(pixel_values=pixels, **batch).logits
        labels, hits = batch["labels"], logits.argmax(-1) == batch["labels"]
        is_location = labels >= tokenizer.convert_tokens_to_ids("<loc_0>")
        is_special = torch.isin(labels, torch.tensor([IGNORED, *SPECIAL]))
        kinds = {"locations": is_location, "labels": ~is_location & ~is_special}
        for kind, mask in kinds.items():
            right[kind] += int(hits[mask].sum())
            total[kind] += int(mask.sum())
    return {f"{kind}_right": right[kind] / total[kind] for kind in right}


@torch.no_grad()
def of_language_model(model: Any, tokenizer: Any, pictures: Pictures) -> dict[str, float]:
    """Cross-entropy per token, in nats, on texts like those of its training."""
    rng = np.random.default_rng(pictures.seed)
    texts = [partial_text(scene, rng) for scene in pictures.scenes]
    return {"loss_per_token": float(model(**tokenize_captions(tokenizer, texts)).loss)}
