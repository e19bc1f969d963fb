"""The full-size models on the meta device: shapes and counts, no memory."""

from dataclasses import replace

import pytest
import torch

from benchmarks.training import models
from vlv_model.checkpoints.published import PARAMETERS, QWEN_25

META = torch.device("meta")
FULL = models.SIZES["full"]
BART_STACKS = 413_631_488 - 51_289 * 1024  # the language model without its shared embeddings
QUERIES = 77 * 1024
CAPTION_PROJECTOR = 2 * (1024 * 1024 + 1024)


def count(module, trainable=False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def trainable_parts(module) -> set[str]:
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    return {name.split(".layers.")[0].split(".embed_positions")[0] for name in names}


@pytest.fixture(scope="module")
def autoencoder():
    return models.autoencoder(FULL, META)


@pytest.fixture(scope="module")
def encoder(autoencoder):
    return autoencoder.encoder


def test_florence_has_the_published_size(encoder):
    florence = encoder.florence
    # The hub counts 776,721,497: our parameters and two buffers, the cosine table of the temporal
    # embedding and the bias of the logits, which we do not hold.
    assert count(florence) + 100 * 2048 + 51_289 == 776_721_497
    assert count(florence.vision_tower) == 360_632_320
    assert count(florence.language_model) == 413_631_488


def test_stage_1_at_full_size(autoencoder):
    decoder, text_encoder = autoencoder.diffusion_decoder, autoencoder.text_encoder
    assert autoencoder.latent_shape == (4, 48, 48)
    assert count(decoder.unet) == PARAMETERS["unet"]
    assert count(decoder.vae) == PARAMETERS["vae"]
    assert count(text_encoder) == PARAMETERS["text_encoder"]
    assert count(autoencoder, trainable=True) == BART_STACKS + QUERIES + CAPTION_PROJECTOR
    assert trainable_parts(autoencoder) == {
        "encoder.learnable_queries",
        "encoder.caption_projector.0.weight",
        "encoder.caption_projector.0.bias",
        "encoder.caption_projector.2.weight",
        "encoder.caption_projector.2.bias",
        "encoder.florence.language_model.encoder",
        "encoder.florence.language_model.encoder.layernorm_embedding.weight",
        "encoder.florence.language_model.encoder.layernorm_embedding.bias",
        "encoder.florence.language_model.decoder",
        "encoder.florence.language_model.decoder.layernorm_embedding.weight",
        "encoder.florence.language_model.decoder.layernorm_embedding.bias",
    }


@pytest.mark.parametrize("size", QWEN_25)
def test_stage_2_at_full_size(size):
    captioner = models.captioner(replace(FULL, language_model=QWEN_25[size]), META)
    language_model, projector = captioner.language_model, captioner.language_projector
    hidden = language_model.config.hidden_size
    assert count(language_model) == PARAMETERS[size]
    assert count(projector) == (1024 + 1) * hidden + (hidden + 1) * hidden
    expected = {
        "projector": count(projector),
        "projector+llm": count(projector) + PARAMETERS[size],
        "projector+llm+encoder": count(projector) + PARAMETERS[size] + BART_STACKS,
    }
    for trainable, parameters in expected.items():
        captioner.set_trainable(trainable)
        assert count(captioner, trainable=True) == parameters
        frozen = ("encoder.learnable_queries", "encoder.caption_projector", "text_encoder")
        assert not [p for p in trainable_parts(captioner) if p.startswith(frozen)]


def test_shapes_at_full_size(autoencoder, encoder):
    pixels = torch.zeros(2, 3, 768, 768, device="meta")
    features = encoder.florence.get_image_features(pixels).pooler_output
    assert features.shape == (2, 577, 1024)  # the spatial mean and 24 x 24 patches
    queries = encoder.learnable_queries.expand(2, -1, -1)
    embeddings = autoencoder.text_encoder(encoder.caption_projector(queries))
    assert embeddings.shape == (2, 77, 1024)
