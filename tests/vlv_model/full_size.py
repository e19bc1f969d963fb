"""Models of the published sizes on the meta device: shapes and counts, no memory."""

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Florence2Config,
    Florence2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.published_configs import FLORENCE_2_LARGE, QWEN_25, SD_21_BASE_TEXT_ENCODER
from vlv_model.captioner import VLVCaptioner, build_language_projector
from vlv_model.config import ModelConfig
from vlv_model.encoder import VLVEncoder
from vlv_model.loading import load_caption_tokenizer, load_florence, resolve_model
from vlv_model.text_encoder import TextEncoder

CONFIG = ModelConfig()


def build_encoder(tiny) -> VLVEncoder:
    """Florence-2-large with the tokenizer of the tiny models."""
    _, tokenizer = load_florence(resolve_model(tiny)[0])
    with torch.device("meta"):
        florence = Florence2Model(Florence2Config(**FLORENCE_2_LARGE))
        return VLVEncoder(
            florence,
            tokenizer,
            width=1024,
            num_queries=CONFIG.num_queries,
            encoder_image_size=CONFIG.encoder_image_size,
            prompt=CONFIG.prompt,
        )


def build_text_encoder() -> TextEncoder:
    """The text encoder of Stable Diffusion 2.1-base."""
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(**SD_21_BASE_TEXT_ENCODER))
    return TextEncoder(clip, tokenizer=None)


def build_captioner(tiny, encoder: VLVEncoder, text_encoder: TextEncoder, size) -> VLVCaptioner:
    """A captioner with Qwen2.5 of that size."""
    with torch.device("meta"):
        language_model = Qwen2ForCausalLM(Qwen2Config(**QWEN_25[size]))
        projector = build_language_projector(1024, language_model.config.hidden_size, seed=0)
    return VLVCaptioner(
        encoder, text_encoder, projector, language_model, load_caption_tokenizer(tiny)
    )
