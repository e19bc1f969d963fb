"""Models with random weights for benchmarks, in sizes tiny, small and full.

`tiny` is vlv_model.tiny, `full` the published configurations. `small` is about a tenth of `full` in
width, depth and vocabulary, with the same image size and sequence lengths. No model hub is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from pipelines.tiny_world.pretrained import FOLDER, MODELS
from vlv_model import tiny
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints import published
from vlv_model.checkpoints.loading import load_caption_tokenizer, load_florence, resolve_model
from vlv_model.checkpoints.skeleton import build_autoencoder, build_captioner
from vlv_model.config import ModelConfig

if TYPE_CHECKING:
    from vlv_model.autoencoder import VLVAutoEncoder


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

    @property
    def model(self) -> ModelConfig:
        """The sizes; the names of the parts mean nothing."""
        return ModelConfig(
            num_queries=self.num_queries,
            image_size=self.image_size,
            encoder_image_size=self.encoder_image_size,
        )

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """The configuration of each part."""
        parts = ("florence", "text_encoder", "vae", "unet", "scheduler", "language_model")
        return {part: getattr(self, part) for part in parts}


_DEFAULTS = ModelConfig()
PARAGRAPH = (60, 240)  # tokens of teachers' captions of photographs; drawn uniformly
_TENTH = {  # about a tenth of the published sizes; heads of 64 and norm groups limit the choice
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
        "bos_token_id": None,
        "eos_token_id": None,
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
    return build_autoencoder(size.model, size.configs, _tokenizers()[0], device)


def captioner(size: Size, device: torch.device, seed: int = 0) -> VLVCaptioner:
    """Stage 2's model with everything trainable, float32, on `device`; seed as in `autoencoder`."""
    torch.manual_seed(seed)
    tokenizer, caption_tokenizer = _tokenizers()
    return build_captioner(size.model, size.configs, tokenizer, device, caption_tokenizer)


def _tokenizers() -> tuple[Any, Any]:
    """Those of the tiny world; Florence-2's splits the prompt into 13 tokens, as the published one does."""
    shipped = resolve_model(FOLDER / MODELS)[0]
    return load_florence(shipped)[1], load_caption_tokenizer(shipped)
