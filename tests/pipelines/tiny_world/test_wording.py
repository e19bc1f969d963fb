import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipelines.tiny_world import scenes
from pipelines.tiny_world.wording import INVERSE, web_text

TRAIN = scenes.scenes_of("train")
WORDS = {"a", "and", "on", "background", "object", "of", "left", "right", "above", "below"}


@given(st.integers(0, len(TRAIN) - 1), st.integers(0, 2**32 - 1))
def test_a_text_says_nothing_untrue_and_fits_the_text_encoder(index: int, seed: int) -> None:
    scene = TRAIN[index]
    text = web_text(scene, np.random.default_rng(seed))
    things = (scene.first, scene.second)
    told = {word for thing in things for word in (thing.size, thing.colour, thing.shape)}
    words = text.split()
    assert set(words) <= WORDS | told | {scene.background}
    assert len(words) <= 14  # and two special tokens: the text encoder has 16 positions
    allowed = {scene.relation, INVERSE[scene.relation]}
    assert not ({*INVERSE, *INVERSE.values()} - allowed) & {p for p in INVERSE if p in text}
    pairs = set(itertools.pairwise(words))
    assert not pairs & scenes.HELD_OUT


def test_texts_differ_and_the_canonical_caption_is_common() -> None:
    rng = np.random.default_rng(0)
    texts = [web_text(TRAIN[0], rng) for _ in range(300)]
    assert len(set(texts)) > 60
    assert 0.3 < texts.count(scenes.caption(TRAIN[0])) / 300 < 0.55


def test_the_second_object_can_come_first_with_the_inverse_relation() -> None:
    scene = scenes.parse("a large red circle left of a small blue square on a gray background")
    assert scene is not None
    rng = np.random.default_rng(0)
    texts = {web_text(scene, rng) for _ in range(2000)}
    assert "a small blue square right of a large red circle on a gray background" in texts
    assert "a small blue square left of a large red circle on a gray background" not in texts
