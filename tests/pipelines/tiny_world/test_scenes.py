"""The tiny world has exact captions, disjoint splits and unambiguous images."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.tiny_world import scenes
from pipelines.tiny_world.scenes import COLOURS, Object, Scene, caption, draw, parse, sample

objects = st.builds(
    Object,
    st.sampled_from(scenes.SIZES),
    st.sampled_from(list(COLOURS)),
    st.sampled_from(scenes.SHAPES),
)
any_scene = st.builds(
    Scene,
    objects,
    objects,
    st.sampled_from(scenes.RELATIONS),
    st.sampled_from(list(scenes.BACKGROUNDS)),
)


@settings(deadline=None)
@given(any_scene)
def test_parse_is_the_inverse_of_caption(scene: Scene) -> None:
    assert parse(caption(scene)) == scene


@settings(deadline=None)
@given(any_scene, st.integers(0, 13), st.sampled_from(["", "red", "large large", "pink", "a"]))
def test_a_changed_word_changes_the_scene_or_is_refused(scene: Scene, i: int, word: str) -> None:
    words = caption(scene).split()
    words[min(i, len(words) - 1)] = word
    changed = " ".join(words)
    read = parse(changed)
    assert read is None or caption(read) == changed


@settings(deadline=None)
@given(st.text())
def test_other_texts_are_not_captions(text: str) -> None:
    assert parse(text) is None


def test_splits_share_no_scene_and_cover_all() -> None:
    pools = [scenes.scenes_of(split, held) for split in scenes.SPLITS for held in (False, True)]
    everything = [scene for pool in pools for scene in pool]
    assert len(everything) == len(set(everything)) == (2 * 10 * 4) ** 2 * 2 * 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_held_out_pairs_are_only_in_the_test_split(split: scenes.Split) -> None:
    drawn = sample(3, 2000, split)
    shown = {(o.colour, o.shape) for scene in drawn for o in (scene.first, scene.second)}
    assert not shown & scenes.HELD_OUT
    # … while each of their colours and shapes is seen elsewhere.
    assert {colour for colour, _ in shown} == set(COLOURS)
    assert {shape for _, shape in shown} == set(scenes.SHAPES)


def test_every_second_test_scene_is_held_out_in_combination() -> None:
    held = [scenes.is_held_out(scene) for scene in sample(0, 100, "test")]
    assert held == [False, True] * 50


def test_sample_depends_on_seed_alone_and_repeats_late() -> None:
    pool = len(scenes.scenes_of("validation"))
    drawn = sample(7, 2 * pool, "validation")
    assert drawn == sample(7, 2 * pool, "validation")
    assert drawn[:20] != sample(8, 20, "validation")
    assert len(set(drawn[:pool])) == pool
    assert set(Counter(drawn).values()) == {2}


def _extent(pixels: np.ndarray, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Bounding box, (y, x) minimum and maximum, of the pixels of exactly this colour."""
    where = np.argwhere((pixels == np.array(colour)).all(-1))
    return where.min(0), where.max(0)


@settings(max_examples=60, deadline=None)
@given(any_scene, st.integers(0, 2**63))
def test_pictures_show_what_captions_say(scene: Scene, seed: int) -> None:
    pixels = np.asarray(draw(scene, seed))
    assert pixels.shape == (64, 64, 3)
    assert tuple(pixels[0, 0]) == scenes.BACKGROUNDS[scene.background]
    if scene.first.colour == scene.second.colour:
        return  # the two cannot be told apart by colour alone
    axis = 1 if scene.relation == "left of" else 0
    (low1, high1), (low2, high2) = (
        _extent(pixels, COLOURS[o.colour]) for o in (scene.first, scene.second)
    )
    assert high1[axis] < low2[axis]
    distance = (low2 + high2 - low1 - high1) / 2
    assert abs(distance[1 - axis]) <= 0.5 * distance[axis] + 2
    for thing, low, high in ((scene.first, low1, high1), (scene.second, low2, high2)):
        side = (high - low).max() + 1
        between = 2 * 11.25 * (0.8 if thing.shape == "square" else 1) - 1  # of the two sizes
        assert (side > between) == (thing.size == "large")


def test_drawing_is_deterministic_and_jittered() -> None:
    (scene,) = sample(0, 1)
    assert draw(scene, 5).tobytes() == draw(scene, 5).tobytes()
    assert draw(scene, 5).tobytes() != draw(scene, 6).tobytes()
