import copy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vlv_model.precision import cast

POSITIONS = [77, 376]  # the first caption token, and the last of 300


@pytest.fixture(scope="module")
def language_model():
    """Narrow and shallow, with the heads and angles of Qwen2.5-3B."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        rope_theta=1_000_000.0, initializer_range=0.1,
    )  # fmt: skip
    assert config.hidden_size // config.num_attention_heads == 128
    return Qwen2ForCausalLM(config).eval()


def logits(model):
    """Logits of a fixed sequence at some positions, `[position vocabulary]`."""
    ids = torch.randint(512, (1, 400), generator=torch.manual_seed(1))
    with torch.no_grad():
        return model(ids).logits[0, POSITIONS].float()


def test_rotary_angles_stay_float32(language_model):
    """Rounded frequencies give wrong angles at far positions."""
    low = cast(copy.deepcopy(language_model), "bfloat16")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    # The same rounded weights in float32 arithmetic: what is left is the arithmetic and the angles.
    exact = logits(cast(copy.deepcopy(low), "float32"))
    rounded = logits(copy.deepcopy(language_model).to(torch.bfloat16))
    off, off_before = ((found - exact).abs().mean(-1) for found in (logits(low), rounded))
    assert (off < torch.tensor([0.8, 0.3]) * off_before).all(), (off, off_before)
    assert (off < 0.05 * exact.std(-1)).all()


def test_weights_are_cast_and_buffers_are_not(autoencoder, captioner):
    for model in (autoencoder, captioner):
        tables = {name: buffer.clone() for name, buffer in model.named_buffers()}
        floats = [name for name, table in tables.items() if table.is_floating_point()]
        assert any("pos_idx_to_embed" in name for name in floats)
        tied = model.encoder.florence.language_model
        assert cast(model, "bfloat16") is model
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert tied.shared.weight is tied.encoder.embed_tokens.weight
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, tables[name])
            assert buffer.dtype == tables[name].dtype
    assert any("rotary_emb.inv_freq" in name for name in floats)
