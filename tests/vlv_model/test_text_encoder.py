from functools import partial

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from tests.vlv_model import formulas as reference
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.errors import ModelError
from vlv_model.text_encoder import TextEncoder

PROMPTS = ["a large red circle", "", "two small squares left of a blue star"]


@pytest.fixture
def text_encoder(autoencoder):
    return autoencoder.text_encoder


def test_embeddings_take_the_token_path(text_encoder):
    ids = text_encoder.tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = text_encoder.clip(input_ids=ids).last_hidden_state
        tokens = text_encoder.clip.embeddings.token_embedding(ids)
        assert (text_encoder(tokens) - expected).abs().max() < 1e-6
        assert (reference.clip_text(text_encoder.clip, tokens) - expected).abs().max() < 1e-5


def test_prompts_fill_all_positions_without_a_mask(tiny, text_encoder):
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "diffusion" / "tokenizer")
    clip = CLIPTextModel.from_pretrained(tiny / "diffusion" / "text_encoder").eval()
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=20, return_tensors="pt")
    with torch.no_grad():
        expected = clip(input_ids=tokens.input_ids).last_hidden_state
    embeddings = text_encoder.encode_prompts(PROMPTS)
    assert embeddings.shape == (3, 20, 64)
    assert (embeddings - expected).abs().max() < 1e-6
    assert text_encoder.encode_prompts(["red " * 500]).shape == (1, 20, 64)


def test_attention_is_causal(text_encoder):
    embeddings = torch.randn(1, 16, text_encoder.width)
    changed = embeddings.clone()
    changed[:, 9:] *= -1  # a shift would vanish in the layer norm
    with torch.no_grad():
        before, after = text_encoder(embeddings), text_encoder(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-3


def test_gradient_passes_through_but_not_into_it(text_encoder):
    embeddings = torch.randn(2, 16, text_encoder.width, requires_grad=True)
    text_encoder.train()
    text_encoder(embeddings).square().sum().backward()
    assert embeddings.grad.abs().amax(-1).min() > 0
    assert all(p.grad is None for p in text_encoder.parameters())
    assert not any(part.training for part in text_encoder.modules())


def test_more_queries_than_positions_are_rejected(text_encoder):
    text_encoder.check_queries(20)
    with pytest.raises(ModelError, match="num_queries is 21, the text encoder has 20 positions"):
        text_encoder.check_queries(21)


def test_without_the_bottleneck_embeddings_skip_it_and_prompts_do_not(text_encoder):
    bypassed = TextEncoder(text_encoder.clip, text_encoder.tokenizer, bottleneck=False)
    embeddings = torch.randn(2, 16, text_encoder.width)
    assert torch.equal(bypassed(embeddings), embeddings)
    assert torch.equal(bypassed.encode_prompts(PROMPTS), text_encoder.encode_prompts(PROMPTS))


def test_the_models_are_built_without_the_bottleneck_where_the_settings_say_so(tiny, squares):
    with torch.no_grad():
        for kind in (VLVAutoEncoder, VLVCaptioner):
            build = partial(kind.from_pretrained, tiny)
            model = build(bottleneck=False)
            assert torch.equal(model.clip_embeddings(squares), model.encoder(squares))
            walled = build()
            assert not torch.allclose(walled.clip_embeddings(squares), model.encoder(squares))
