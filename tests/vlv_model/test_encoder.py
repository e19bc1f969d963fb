import pytest
import torch
from transformers import AutoTokenizer, Florence2ForConditionalGeneration

from tests.vlv_model import formulas as reference
from vlv_model.checkpoints.loading import load_florence, resolve_model
from vlv_model.config import MORE_DETAILED_CAPTION, ModelConfig
from vlv_model.encoder import VLVEncoder
from vlv_model.errors import ModelError
from vlv_model.preprocessing import encoder_pixels
from vlv_model.squares import Square


@pytest.fixture
def encoder(autoencoder):
    return autoencoder.encoder


def with_settings(tiny, **settings) -> ModelConfig:
    config, _ = resolve_model(tiny)
    return ModelConfig.model_validate(config.model_dump() | settings)


def test_caption_embeddings_equal_the_reference(tiny, encoder, squares):
    florence = Florence2ForConditionalGeneration.from_pretrained(tiny / "florence").eval()
    pixels = encoder_pixels(squares, 128)
    with torch.no_grad():
        expected = reference.caption_embeddings(
            florence,
            AutoTokenizer.from_pretrained(tiny / "florence"),
            MORE_DETAILED_CAPTION,
            encoder.learnable_queries,
            encoder.caption_projector.state_dict(),
            pixels,
        )
        ours = encoder(squares)
        assert ours.shape == (4, 16, 64)
        assert (ours - expected).abs().max() < 1e-5
        assert (encoder(pixels) - ours).abs().max() < 1e-6  # float pixels are taken as they are


def test_queries_differ_by_image_and_rows_are_independent(encoder, squares):
    with torch.no_grad():
        together = encoder(squares)
        alone = torch.cat([encoder(square[None]) for square in squares])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_queries_attend_causally(encoder, squares):
    with torch.no_grad():
        before = encoder(squares)
        encoder.learnable_queries[:, 10:] *= -1  # a shift would vanish in the layer norm
        after = encoder(squares)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 1e-4


def test_train_mode_has_dropout_but_wakes_no_frozen_part(encoder, squares):
    encoder.train()
    encoder.florence.train()
    encoder.florence.vision_tower.train()
    bart = encoder.florence.language_model
    for layer in [*bart.encoder.layers, *bart.decoder.layers]:
        layer.dropout = 0.1  # as published; the tiny one has none
    awake = {name for name, part in encoder.named_modules() if part.training}
    assert {"", "caption_projector", "florence.language_model.encoder.layers.0"} <= awake
    frozen = ("florence.vision_tower", "florence.multi_modal_projector")
    assert not [name for name in awake if name.startswith(frozen) or "embed_tokens" in name]
    assert not bart.shared.training
    drop_path = [m for m in encoder.modules() if type(m).__name__ == "Florence2DropPath"]
    assert drop_path
    pixels = encoder_pixels(squares, 128)
    with torch.no_grad():
        features = [encoder.florence.get_image_features(pixels).pooler_output for _ in range(3)]
        first, second = encoder(squares), encoder(squares)
    assert all(torch.equal(features[0], other) for other in features)
    assert not torch.allclose(first, second, atol=1e-4)


def test_gradients_reach_exactly_what_is_trained(encoder, squares):
    encoder.train()
    encoder(squares).square().sum().backward()
    reached = {n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    trained = {
        name
        for name, _ in encoder.named_parameters()
        if name.startswith(("learnable_queries", "caption_projector.", "florence.language_model."))
        and name != "florence.language_model.shared.weight"
        # softmax does not see a bias of the keys: its gradient is zero but for rounding
    }
    assert {n for n, p in encoder.named_parameters() if p.grad is not None} == trained
    assert trained - reached <= {n for n in trained if n.endswith("k_proj.bias")}


def test_same_seed_same_queries(tiny, encoder):
    again = VLVEncoder.from_pretrained(tiny)
    other = VLVEncoder.from_pretrained(with_settings(tiny, projector_seed=1))
    for name in ("learnable_queries", "caption_projector.0.weight"):
        assert torch.equal(again.state_dict()[name], encoder.state_dict()[name])
        assert not torch.equal(other.state_dict()[name], encoder.state_dict()[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_queries": 161}, "num_queries need 161 positions"),
        ({"encoder_image_size": 256}, "image features and prompt need 270 positions"),
        ({"prompt": "word " * 200}, "image features and prompt"),
    ],
)
def test_sizes_that_do_not_fit_florence_are_rejected(tiny, settings, message):
    with pytest.raises(ModelError, match=message):
        VLVEncoder.from_pretrained(with_settings(tiny, **settings))


def test_a_grid_beyond_the_vision_positions_is_rejected(tiny):
    florence, tokenizer = load_florence(resolve_model(tiny)[0])
    florence.config.text_config.max_position_embeddings = 1000
    sizes = {"width": 64, "num_queries": 16, "square": Square(64), "encoder_image_size": 272}
    with pytest.raises(ModelError, match=r"gives a 17 x 17 grid") as error:
        VLVEncoder(florence, tokenizer, prompt="what", **sizes)
    assert "\n" not in str(error.value)


def test_embeddings_can_start_nearly_alike(tiny, squares):
    loud, quiet = (VLVEncoder.from_pretrained(tiny, projector_scale=x) for x in (1.0, 0.1))
    with torch.no_grad():
        assert torch.allclose(quiet(squares), 0.1 * loud(squares), atol=1e-6)
