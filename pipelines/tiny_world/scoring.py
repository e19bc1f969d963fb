"""Scores captions and images of scenes by attribute.

A scene has five attributes: size, colour and shape of each of its two objects, the relation and the
background. Images are scored by the reading of `judge.read`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.tiny_world.judge import Pair, Reading, read
from pipelines.tiny_world.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    parse,
)
from vlv_model.errors import DataError

ATTRIBUTES = ("size", "colour", "shape", "relation", "background")


def score_captions(scenes: Sequence[Scene], captions: Sequence[str | None]) -> dict[str, Any]:
    """`exact_match`: the share of exactly right captions; `attributes`: the accuracy of each attribute.

    A caption outside the grammar is not exact, but its attributes are read (`read_caption`). None, for a
    failed caption, has all attributes wrong. Raises DataError without scenes, ValueError if the lengths
    differ.
    """
    accuracies = _accuracies(scenes, [read_caption(caption or "") for caption in captions])
    pairs = zip(scenes, captions, strict=True)
    exact = [caption is not None and parse(caption) == scene for scene, caption in pairs]
    return {"exact_match": _mean(exact), "attributes": accuracies}


def score_pictures(
    scenes: Sequence[Scene], pictures: Sequence[NDArray[np.uint8]]
) -> dict[str, float]:
    """Read images, uint8 `[64 64 3]`, with the judge and score the readings (`score_readings`)."""
    return score_readings(scenes, [read(picture) for picture in pictures])


def score_readings(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, float]:
    """The accuracy of each attribute, and their mean as `attributes`.

    Raises DataError without scenes, ValueError if the lengths differ.
    """
    accuracies = _accuracies(scenes, readings)
    return {"attributes": _mean(accuracies.values()), **accuracies}


def agreement(scene: Scene, reading: Reading) -> dict[str, float]:
    """The share of each attribute that is right: 0, 0.5 or 1 for attributes of both objects."""
    shares = {}
    for name in ("size", "colour", "shape"):
        true = (getattr(scene.first, name), getattr(scene.second, name))
        shares[name] = _mean(a == b for a, b in zip(true, getattr(reading, name), strict=True))
    shares["relation"] = float(reading.relation == scene.relation)
    shares["background"] = float(reading.background == scene.background)
    return shares


def read_caption(caption: str) -> Reading:
    """Read the attributes of a caption, also outside the grammar.

    Words before the relation belong to the first object, words after it to the second. Without exactly
    one relation, the first word of a kind belongs to the first object, the rest to the second. An object
    without exactly one word of a kind has None.
    """
    relations = list(re.finditer(rf"\b({'|'.join(RELATIONS)})\b", caption))
    relation = relations[0][0] if len(relations) == 1 else None

    def pair(choices: Collection[str]) -> Pair:
        if relation is None:
            words = _words(caption, choices)
            return _only(words[:1]), _only(words[1:])
        before, after = caption[: relations[0].start()], caption[relations[0].end() :]
        return _only(_words(before, choices)), _only(_words(after, choices))

    background = _only(_words(caption, BACKGROUNDS))
    return Reading(pair(SIZES), pair(COLOURS), pair(SHAPES), relation, background)


def _words(text: str, choices: Collection[str]) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in choices]


def _only(words: Sequence[str]) -> str | None:
    return words[0] if len(words) == 1 else None


def _accuracies(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, float]:
    if not scenes:
        raise DataError("no scenes to score: an accuracy needs at least one")
    shares = [agreement(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]
    return {name: _mean(share[name] for share in shares) for name in ATTRIBUTES}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
