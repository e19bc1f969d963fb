"""At full size, on the meta device: the map has a place for every tensor, and each its own."""

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Florence2Config,
    Florence2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.vlv_model import published_layout
from tests.vlv_model.published_configs import FLORENCE_2_LARGE, QWEN_25, SD_21_BASE_TEXT_ENCODER
from vlv_model.captioner import VLVCaptioner, build_language_projector
from vlv_model.config import ModelConfig
from vlv_model.encoder import VLVEncoder
from vlv_model.loading import load_caption_tokenizer, load_florence, resolve_model
from vlv_model.reference_layout import BIAS, HEAD, expected_tensors
from vlv_model.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def full_size(tiny):
    """The captioner of the paper: Florence-2-large, the text encoder of SD 2.1, Qwen2.5-3B."""
    config = ModelConfig()
    _, tokenizer = load_florence(resolve_model(tiny)[0])
    with torch.device("meta"):
        encoder = VLVEncoder(
            Florence2Model(Florence2Config(**FLORENCE_2_LARGE)),
            tokenizer,
            width=1024,
            num_queries=config.num_queries,
            encoder_image_size=config.encoder_image_size,
            prompt=config.prompt,
        )
        clip = CLIPTextModel(CLIPTextConfig(**SD_21_BASE_TEXT_ENCODER))
        language_model = Qwen2ForCausalLM(Qwen2Config(**QWEN_25["3B"]))
        projector = build_language_projector(1024, 2048, seed=0)
    return VLVCaptioner(
        encoder, TextEncoder(clip, None), projector, language_model, load_caption_tokenizer(tiny)
    )


def test_every_tensor_has_one_place(full_size):
    published = published_layout.stage2(full_size)
    expected = expected_tensors(full_size.state_dict(), "stage2")
    unused = {f"VLV_model.{HEAD}", f"VLV_model.{BIAS}"}
    assert published.keys() == expected.keys() | unused
    assert {n: one.shape for n, one in expected.items()} == {
        n: list(t.shape) for n, t in published.items() if n not in unused
    }
    assert sorted(one.ours for one in expected.values()) == sorted(full_size.state_dict())
    assert [n for n, one in expected.items() if one.transposed] == [
        "VLV_model.model.image_projection"
    ]
    assert expected["VLV_model.model.image_projection"].shape == [2048, 1024]


def test_the_layout_of_florence_has_the_published_size(full_size):
    """The hub counts 776,721,497 numbers in the remote code's checkpoint, one copy of the words."""
    tensors = published_layout.florence(full_size.encoder.florence)
    copies = ("lm_head.weight", "embed_tokens.weight")
    assert sum(t.numel() for n, t in tensors.items() if not n.endswith(copies)) == 776_721_497
