"""Tiny folders of the extractors' classes, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from vlv_model.features.extractors import CLIP_MEAN, CLIP_STD
from vlv_model.preprocessing import IMAGENET_MEAN, IMAGENET_STD

WIDTH = 12  # of CLIP's embeddings


def write_clip(folder: Path, tokenizer: Path, seed: int = 0) -> str:
    """Both towers of a CLIP for images of 32 pixels, with the tokenizer of a folder."""
    torch.manual_seed(seed)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection_dim": WIDTH}
    text = CLIPTextConfig(
        vocab_size=len(words), bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id, max_position_embeddings=20, **sizes,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    _write_preprocessor(folder, 32, 32, CLIP_MEAN, CLIP_STD)
    return str(folder)


def write_dinov2(folder: Path, seed: int = 0) -> str:
    """A DINOv2 that resizes to 40 pixels and crops 28."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    Dinov2Model(config).save_pretrained(folder)
    _write_preprocessor(folder, 40, 28, IMAGENET_MEAN, IMAGENET_STD)
    return str(folder)


def _write_preprocessor(
    folder: Path, shorter: int, crop: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    content = {
        "do_center_crop": True,
        "do_resize": True,
        "crop_size": {"height": crop, "width": crop},
        "size": {"shortest_edge": shorter},
        "resample": 3,
        "image_mean": mean,
        "image_std": std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
