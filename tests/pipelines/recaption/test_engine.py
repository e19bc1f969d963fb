"""The engine gives the model's captions, and an error affects only its image."""

import copy
from pathlib import Path

import pytest
import torch

from pipelines.cli.config import build
from pipelines.execution.steps import ModelDiedError
from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.engine import local_engine
from tests.vlv_model.drawings import scenes
from vlv_model.caption_tokens import decode_captions, end_of_text_id
from vlv_model.captioner import VLVCaptioner
from vlv_model.errors import ConfigError
from vlv_model.freezing import evaluating

GENERATE = GenerateConfig(num_beams=1, max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def captioner(tiny_models: Path) -> VLVCaptioner:
    return VLVCaptioner.from_pretrained(tiny_models)


@pytest.fixture
def images() -> torch.Tensor:
    return scenes(8, seed=0)  # uint8 [8 3 64 64]


def break_model(
    captioner: VLVCaptioner, monkeypatch: pytest.MonkeyPatch, bad: torch.Tensor | None
) -> None:
    """Make the model fail on batches that hold the image `bad`, or on all."""
    prefix = captioner.prefix

    def failing(pixels: torch.Tensor) -> torch.Tensor:
        if bad is None or any(torch.equal(square, bad) for square in pixels):
            raise RuntimeError("a bad day")
        return prefix(pixels)

    monkeypatch.setattr(captioner, "prefix", failing)


def test_beam_search_follows_early_stopping(captioner, images):
    """Matches transformers' search image by image, with a model whose captions sometimes end."""
    captioner, end = copy.deepcopy(captioner), end_of_text_id(captioner.tokenizer)
    captioner.language_model.get_input_embeddings().weight.data[end] *= 4  # which predicts, too
    found = {}
    for early in (False, True):
        update = {"num_beams": 3, "early_stopping": early, "max_new_tokens": 12}
        engine = local_engine(captioner, GENERATE.model_copy(update=update))
        found[early] = {o.id: o.caption for o in engine.captions(range(8), images)}
        for i, image in enumerate(images):
            with evaluating(captioner):
                ids = captioner.language_model.generate(
                    inputs_embeds=captioner.prefix(image[None]), num_beams=3, early_stopping=early,
                    max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=end,
                )  # fmt: skip
            assert found[early][i] == decode_captions(captioner.tokenizer, ids)[0]
    assert found[True] != found[False]


@pytest.mark.parametrize("beams", [1, 2])
def test_captions_do_not_depend_on_the_batch(captioner, images, beams):
    expected = captioner.generate(images, num_beams=beams, max_new_tokens=6)
    for batch_size in (1, 3, 64):
        settings = GENERATE.model_copy(update={"batch_size": batch_size, "num_beams": beams})
        found = {
            o.id: o.caption for o in local_engine(captioner, settings).captions(range(8), images)
        }
        assert [found[i] for i in range(8)] == expected


def test_a_failing_image_does_not_affect_other_captions(captioner, images, monkeypatch):
    expected = captioner.generate(images, max_new_tokens=6)
    break_model(captioner, monkeypatch, images[4])
    found = {o.id: o for o in local_engine(captioner, GENERATE).captions(range(8), images)}
    assert found[4].caption is None
    assert found[4].error == "RuntimeError: a bad day"
    others = [i for i in range(8) if i != 4]
    assert [found[i].caption for i in others] == [expected[i] for i in others]
    assert len(found) == 8


def test_a_model_that_fails_for_every_image_raises(captioner, images, monkeypatch):
    break_model(captioner, monkeypatch, None)
    with pytest.raises(ModelDiedError, match="fails for every image: a bad day"):
        list(local_engine(captioner, GENERATE).captions(range(8), images))


def test_sampled_captions_depend_only_on_seed_and_key(captioner, images):
    def drawn(seed: int, batch_size: int, keys: list[int]) -> list[str]:
        settings = {"num_beams": 1, "max_new_tokens": 6, "batch_size": batch_size, "seed": seed}
        engine = local_engine(captioner, GenerateConfig(temperature=1.5, top_p=0.9, **settings))
        order = torch.tensor(keys)
        found = {o.id: o.caption.text for o in engine.captions(keys, images[order])}
        return [found[keys.index(key)] for key in range(8)]

    first = drawn(0, 3, list(range(8)))
    assert drawn(0, 5, [7, 6, 5, 4, 3, 2, 1, 0]) == first
    assert drawn(1, 3, list(range(8))) != first
    assert first != [c.text for c in captioner.generate(images, max_new_tokens=6)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 1.0}, r"set generate\.num_beams=1, or leave generate\.temperature out"),
        ({"top_p": 0.5, "num_beams": 1}, "need generate.temperature"),
        ({"temperature": 0.0, "num_beams": 1}, "temperature"),
        (
            {"early_stopping": True, "num_beams": 1},
            "generate.early_stopping needs generate.num_beams of at least 2",
        ),
    ],
)
def test_contradictory_sampling_settings_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        build(GenerateConfig, given)


def test_sampling_settings_are_part_of_the_fingerprint():
    greedy = GenerateConfig(num_beams=1)
    drawn = [
        GenerateConfig(num_beams=1, temperature=t, top_p=p, seed=s)
        for t, p, s in ((1, 1, 0), (1, 1, 1), (1, 0.9, 0), (0.5, 1, 0))
    ]
    searched = [GenerateConfig(early_stopping=early) for early in (False, True)]
    identities = [str(config.identity()) for config in (greedy, *drawn, *searched)]
    assert len(set(identities)) == 7
    assert greedy.identity() == {"num_beams": 1, "max_new_tokens": 300, "precision": "float32"}
