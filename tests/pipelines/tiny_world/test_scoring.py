"""Captions and images are scored by attribute."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.tiny_world.judge import Reading, read
from pipelines.tiny_world.scenes import Object, Scene, caption, draw, sample
from pipelines.tiny_world.scoring import (
    ATTRIBUTES,
    agreement,
    read_caption,
    score_captions,
    score_pictures,
    score_readings,
)
from vlv_model.errors import DataError

SCENE = Scene(
    Object("large", "red", "circle"), Object("small", "blue", "square"), "left of", "gray"
)
ALL = dict.fromkeys(ATTRIBUTES, 1.0)
NOTHING = Reading((None, None), (None, None), (None, None), None, None)


@pytest.mark.parametrize(
    ("text", "less"),
    [
        ("a large red circle left of a small blue square on a gray background", {}),
        # words that differ
        ("a large red circle left of a small blue cross on a gray background", {"shape": 0.5}),
        ("a large red circle above a small blue square on a gray background", {"relation": 0}),
        ("a large red circle left of a small blue square on a white background", {"background": 0}),
        (
            "a small blue square left of a large red circle on a gray background",
            {"size": 0, "colour": 0, "shape": 0},
        ),
        # outside the grammar, read for what it says
        ("large red circle left of small blue square, gray background", {}),
        ("a circle of large size in red left of a square in small blue, gray", {}),
        ("a red circle left of a small blue square on a gray background", {"size": 0.5}),
        ("a large circle left of a small red square on a gray background", {"colour": 0}),
        (
            "a large large red circle left of a small blue square on a gray background",
            {"size": 0.5},
        ),
        (
            "a large red circle left of a small blue red square on a gray background",
            {"colour": 0.5},
        ),
        ("a large red circle left of a small blue square", {"background": 0}),
        ("a large red circle left of a small blue square on a gray white", {"background": 0}),
        ("a large red circle and a small blue square on a gray background", {"relation": 0}),
        (
            "a large red circle and a small blue green square on a gray background",
            {"relation": 0, "colour": 0.5},
        ),
        (
            "a large red circle above left of a small blue square on a gray background",
            {"relation": 0},
        ),
        (
            "a large red circle left of",
            {"size": 0.5, "colour": 0.5, "shape": 0.5, "background": 0},
        ),
        ("redness and circles", dict.fromkeys(ATTRIBUTES, 0)),
        ("", dict.fromkeys(ATTRIBUTES, 0)),
        (None, dict.fromkeys(ATTRIBUTES, 0)),
    ],
)
def test_captions_are_scored_by_attribute(text: str | None, less: dict) -> None:
    exact = float(text == caption(SCENE))
    scores = score_captions([SCENE], [text])
    assert scores == {"exact_match": exact, "attributes": {**ALL, **less}}


def test_captions_have_equal_weight() -> None:
    scores = score_captions([SCENE] * 4, [caption(SCENE)] * 2 + [None, "a large red circle"])
    assert scores["exact_match"] == 0.5
    assert scores["attributes"] == {
        "size": 5 / 8,
        "colour": 5 / 8,
        "shape": 5 / 8,
        "relation": 0.5,
        "background": 0.5,
    }


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(caption(SCENE).split())).map(" ".join))
def test_any_text_is_scored_and_only_the_caption_is_exact(text: str) -> None:
    scores = score_captions([SCENE], [text])
    assert scores["exact_match"] == (text == caption(SCENE))
    assert tuple(scores["attributes"]) == ATTRIBUTES
    assert set(scores["attributes"].values()) <= {0, 0.5, 1}


def test_lenient_reading_agrees_with_the_grammar() -> None:
    for scene in sample(0, 200, "test"):
        assert agreement(scene, read_caption(caption(scene))) == ALL


def test_readings_are_scored_by_attribute_and_by_their_mean() -> None:
    half = Reading(("large", None), ("red", None), ("circle", None), None, "gray")
    whole = read_caption(caption(SCENE))
    scores = score_readings([SCENE] * 2, [half, whole])
    assert scores == {
        "attributes": pytest.approx((3 * 0.75 + 0.5 + 1) / 5),
        "size": 0.75,
        "colour": 0.75,
        "shape": 0.75,
        "relation": 0.5,
        "background": 1.0,
    }
    assert set(score_readings([SCENE], [NOTHING]).values()) == {0.0}
    assert json.loads(json.dumps(scores)) == scores


@pytest.mark.parametrize(
    ("other", "less"),
    [
        (replace(SCENE, background="black"), {"background": 0}),
        (replace(SCENE, relation="above"), {"relation": 0}),
        (replace(SCENE, first=Object("small", "red", "circle")), {"size": 0.5}),
        (replace(SCENE, second=Object("small", "purple", "square")), {"colour": 0.5}),
        (replace(SCENE, second=Object("small", "blue", "triangle")), {"shape": 0.5}),
        (
            replace(SCENE, first=SCENE.second, second=SCENE.first),
            {"size": 0, "colour": 0, "shape": 0},
        ),
    ],
)
def test_a_picture_of_another_scene_is_wrong_where_it_differs(other: Scene, less: dict) -> None:
    reading = read(np.asarray(draw(other, seed=3)))
    assert agreement(SCENE, reading) == {**ALL, **less}
    assert agreement(other, reading) == ALL


def test_pictures_are_scored_by_what_is_read_of_them() -> None:
    drawn = sample(4, 6, "test")
    pictures = [np.asarray(draw(scene, seed)) for seed, scene in enumerate(drawn)]
    assert score_pictures(drawn, pictures) == {"attributes": 1.0, **ALL}
    assert score_pictures(drawn, pictures[1:] + pictures[:1])["attributes"] < 0.8


def test_scoring_nothing_raises() -> None:
    with pytest.raises(DataError, match="no scenes to score"):
        score_captions([], [])
    with pytest.raises(DataError, match="no scenes to score"):
        score_readings([], [])
    with pytest.raises(DataError, match="no scenes to score"):
        score_pictures([], [])


def test_lengths_have_to_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        score_captions([SCENE], [])
    with pytest.raises(ValueError, match="zip"):
        score_readings([SCENE], [NOTHING, NOTHING])
