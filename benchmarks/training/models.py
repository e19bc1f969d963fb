"""Models with random weights for benchmarks, in sizes tiny, small and full.

`tiny` is vlv_model.tiny, `full` the published configurations. `small` is about a tenth of `full` in
width, depth and vocabulary, with the same image size and sequence lengths. No model hub is needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Florence2Config,
    Florence2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.training import published_configs as published
from vlv_model import tiny
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner, build_language_projector
from vlv_model.checkpoints.loading import load_caption_tokenizer, load_florence, resolve_model
from vlv_model.config import ModelConfig
from vlv_model.diffusion_decoder import DiffusionDecoder
from vlv_model.encoder import VLVEncoder
from vlv_model.squares import Square
from vlv_model.text_encoder import TextEncoder


@dataclass(frozen=True)
class Size:
    """Configurations of all parts, image and sequence lengths, and batch sizes."""

    florence: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vae: Mapping[str, Any]
    unet: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    language_model: Mapping[str, Any]
    num_queries: int
    image_size: int
    encoder_image_size: int
    caption_tokens: tuple[int, int]  # shortest and longest caption, with the end-of-text
    batch: tuple[int, int]  # images per step of stage 1 and of stage 2, on one device


_DEFAULTS = ModelConfig()
PARAGRAPH = (60, 240)  # tokens of teachers' captions of photographs; drawn uniformly
_TENTH = {  # about a tenth of published_configs; heads of 64 and norm groups limit the choice
    "florence": {
        "vision_config": {
            **published.FLORENCE_2_LARGE["vision_config"],
            "depths": [1, 1, 1, 1],
            "embed_dim": [32, 64, 96, 192],
            "num_heads": [1, 2, 3, 6],
            "num_groups": [1, 2, 3, 6],
            "projection_dim": 128,
        },
        "text_config": {
            **published.FLORENCE_2_LARGE["text_config"],
            "vocab_size": 5_129,
            "d_model": 128,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 512,
            "decoder_ffn_dim": 512,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
    },
    "text_encoder": {
        **published.SD_21_BASE_TEXT_ENCODER,
        "vocab_size": 4_941,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "vae": {
        **published.SD_21_BASE_VAE,
        "block_out_channels": [16, 32, 48, 48],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    "unet": {
        **published.SD_21_BASE_UNET,
        "block_out_channels": [32, 64, 128, 128],
        "layers_per_block": 1,
        "attention_head_dim": [1, 1, 2, 2],
        "cross_attention_dim": 128,
    },
    "language_model": {
        **published.QWEN_25["3B"],
        "vocab_size": 15_194,
        "hidden_size": 256,
        "intermediate_size": 1_104,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
}
_FULL_LENGTHS: dict[str, Any] = {
    "num_queries": _DEFAULTS.num_queries,
    "image_size": _DEFAULTS.image_size,
    "encoder_image_size": _DEFAULTS.encoder_image_size,
    "caption_tokens": PARAGRAPH,
}

SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "tiny": Size(
            florence={
                "vision_config": tiny.VISION,
                "text_config": {"model_type": "bart", "vocab_size": 1_024, **tiny.BART},
            },
            text_encoder={"vocab_size": 1_024, **tiny.CLIP_TEXT},
            vae=tiny.VAE,
            unet=tiny.UNET,
            scheduler=tiny.SCHEDULER,
            language_model={"vocab_size": 1_024, **tiny.QWEN},
            num_queries=tiny.NUM_QUERIES,
            image_size=tiny.IMAGE_SIZE,
            encoder_image_size=tiny.ENCODER_IMAGE_SIZE,
            caption_tokens=(14, 15),  # captions of drawn scenes
            batch=(32, 32),
        ),
        "small": Size(
            **_TENTH, scheduler=published.SD_21_BASE_SCHEDULER, **_FULL_LENGTHS, batch=(4, 8)
        ),
        "full": Size(
            florence=published.FLORENCE_2_LARGE,
            text_encoder=published.SD_21_BASE_TEXT_ENCODER,
            vae=published.SD_21_BASE_VAE,
            unet=published.SD_21_BASE_UNET,
            scheduler=published.SD_21_BASE_SCHEDULER,
            language_model=published.QWEN_25["3B"],
            **_FULL_LENGTHS,
            batch=(16, 4),  # 4: the reference with its float32 Adam fits 80 GB
        ),
    }
)


def autoencoder(size: Size, device: torch.device, seed: int = 0) -> VLVAutoEncoder:
    """Stage 1's model, float32, on `device`; the same seed and device give the same weights."""
    torch.manual_seed(seed)
    encoder = _encoder(size, device)
    with device:
        vae = AutoencoderKL(**size.vae)
        unet = UNet2DConditionModel(**size.unet)
        text_encoder = _text_encoder(size)
    scheduler = DDPMScheduler.from_config(dict(size.scheduler))
    decoder = DiffusionDecoder(vae, unet, scheduler, size.image_size)
    return VLVAutoEncoder(encoder, text_encoder, decoder)


def captioner(size: Size, device: torch.device, seed: int = 0) -> VLVCaptioner:
    """Stage 2's model with everything trainable, float32, on `device`; seed as in `autoencoder`."""
    torch.manual_seed(seed)
    encoder = _encoder(size, device)
    width, hidden = size.text_encoder["hidden_size"], size.language_model["hidden_size"]
    with device:
        text_encoder = _text_encoder(size)
        language_model = Qwen2ForCausalLM(Qwen2Config(**size.language_model))
        projector = build_language_projector(width, hidden, seed)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_caption_tokenizer(tiny.write_tiny_models(folder))
    return VLVCaptioner(encoder, text_encoder, projector, language_model, tokenizer)


def _encoder(size: Size, device: torch.device) -> VLVEncoder:
    # The tiny tokenizer splits the prompt into 13 tokens, as the published one does.
    with tempfile.TemporaryDirectory() as folder:
        _, tokenizer = load_florence(resolve_model(tiny.write_tiny_models(folder))[0])
    with device:
        florence = Florence2Model(Florence2Config(**_copy(size.florence)))
    encoder = VLVEncoder(
        florence,
        tokenizer,
        width=size.text_encoder["hidden_size"],
        num_queries=size.num_queries,
        square=Square(size.image_size),
        encoder_image_size=size.encoder_image_size,
        prompt=_DEFAULTS.prompt,
    )
    return encoder.to(device)


def _text_encoder(size: Size) -> TextEncoder:
    # The last two tokens, as in CLIP's vocabulary; the default ids are outside a smaller one.
    last = size.text_encoder["vocab_size"] - 1
    special = {"bos_token_id": last - 1, "eos_token_id": last}
    return TextEncoder(
        CLIPTextModel(CLIPTextConfig(**size.text_encoder, **special)), tokenizer=None
    )


def _copy(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy: transformers modifies the dictionaries it gets."""
    return {name: _copy(v) if isinstance(v, Mapping) else v for name, v in config.items()}
