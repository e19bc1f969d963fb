"""The judge reads drawn scenes, and handles any other image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw, ImageFilter

from pipelines.tiny_world.judge import Reading, read
from pipelines.tiny_world.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    draw,
    sample,
)

OBJECTS = [Object(*words) for words in itertools.product(SIZES, COLOURS, SHAPES)]
NOTHING = (None, None)


def reading_of(scene: Scene) -> Reading:
    pairs = ((getattr(o, name) for o in (scene.first, scene.second)) for name in vars(scene.first))
    return Reading(*(tuple(pair) for pair in pairs), scene.relation, scene.background)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def painted(
    background: str, *discs: tuple[tuple[int, int, int], float, float, float]
) -> np.ndarray:
    """Discs (colour, x, y, radius) on a background, with soft edges."""
    picture = Image.new("RGB", (256, 256), BACKGROUNDS[background])
    for colour, x, y, r in discs:
        box = [4 * (x - r), 4 * (y - r), 4 * (x + r), 4 * (y + r)]
        ImageDraw.Draw(picture).ellipse(box, fill=colour)
    return pixels(picture.reduce(4).filter(ImageFilter.GaussianBlur(1.0)))


def test_every_object_is_read_in_all_positions_and_backgrounds() -> None:
    others = np.random.default_rng(0).permutation(len(OBJECTS))
    frames = itertools.cycle(itertools.product(RELATIONS, BACKGROUNDS))
    for i, (thing, other) in enumerate(zip(OBJECTS, others, strict=True)):
        for first, second in ((thing, OBJECTS[other]), (OBJECTS[other], thing)):
            relation, background = next(frames)
            scene = Scene(first, second, relation, background)
            assert read(pixels(draw(scene, i))) == reading_of(scene), scene


@pytest.mark.parametrize("split", ["train", "test"])
def test_sampled_scenes_are_read_right(split: str) -> None:
    for seed, scene in enumerate(sample(1, 150, split)):
        assert read(pixels(draw(scene, 1000 + seed))) == reading_of(scene), scene


def _shifted(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    moved = pixels(picture) + rng.uniform(-20, 20, size=3)
    return moved.clip(0, 255).astype(np.uint8)


def _noisy(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(0, 12, size=(64, 64, 3))
    return (pixels(picture) + noise).clip(0, 255).astype(np.uint8)


def _pale(picture: Image.Image, _: np.random.Generator) -> np.ndarray:
    empty = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    return pixels(Image.blend(empty, picture, 0.5))


def _blurred(picture: Image.Image, _: np.random.Generator) -> np.ndarray:
    return pixels(picture.filter(ImageFilter.GaussianBlur(1.0)))


def _very_blurred(picture: Image.Image, _: np.random.Generator) -> np.ndarray:
    return pixels(picture.filter(ImageFilter.GaussianBlur(2.0)))


@pytest.mark.parametrize("damage", [_blurred, _very_blurred, _noisy, _shifted, _pale])
def test_damaged_pictures_are_read_right(damage) -> None:
    rng = np.random.default_rng(0)
    wrong = []
    for seed, scene in enumerate(sample(2, 60, "test")):
        if read(damage(draw(scene, seed), rng)) != reading_of(scene):
            wrong.append(scene)
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_image_has_only_a_background(background: str) -> None:
    assert read(painted(background)) == Reading(NOTHING, NOTHING, NOTHING, None, background)


def test_one_object_alone_is_first_or_second_by_its_place() -> None:
    right = read(painted("white", (COLOURS["yellow"], 47, 35, 12)))
    assert right == Reading(
        (None, "large"), (None, "yellow"), (None, "circle"), None, background="white"
    )
    upper = read(painted("gray", (COLOURS["red"], 34, 17, 8)))
    assert upper == Reading(
        ("small", None), ("red", None), ("circle", None), None, background="gray"
    )


def test_specks_and_faint_halos_are_ignored() -> None:
    faint = (148, 110, 110)  # a fifth of red on gray
    one = ("small", None), ("blue", None), ("circle", None)
    for disturbance in ((COLOURS["red"], 48, 32, 2.0), (faint, 48, 32, 8)):
        picture = painted("gray", (COLOURS["blue"], 17, 32, 8), disturbance)
        assert read(picture) == Reading(*one, None, "gray")


def test_of_three_objects_the_two_strongest_are_read() -> None:
    large = [(COLOURS["blue"], 17, 32, 12), (COLOURS["red"], 47, 34, 12)]
    reading = read(painted("black", *large, (COLOURS["red"], 32, 56, 5)))
    assert reading.colour == ("blue", "red")
    assert reading.size == ("large", "large")


@pytest.mark.parametrize("colour", ["red", "cyan"])
def test_touching_objects_are_separated(colour: str) -> None:
    """A large template between two small objects would explain more than either of them."""
    picture = painted("gray", (COLOURS["red"], 22, 32, 10), (COLOURS[colour], 42, 32, 10))
    assert read(picture) == Reading(
        ("small", "small"), ("red", colour), ("circle", "circle"), "left of", "gray"
    )


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(np.uint8, (64, 64, 3))
    | st.integers(0, 2**32).map(
        lambda seed: np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    )
)
def test_any_picture_is_read(picture: np.ndarray) -> None:
    reading = read(picture)
    assert reading.background in BACKGROUNDS
    both = None not in (*reading.size, *reading.colour, *reading.shape)
    assert (reading.relation is not None) == both
    for size, colour, shape in zip(reading.size, reading.colour, reading.shape, strict=True):
        words = (size, colour, shape)
        assert words == (None,) * 3 or Object(*words) in OBJECTS


@pytest.mark.parametrize(
    "picture",
    [np.zeros((64, 64), np.uint8), np.zeros((3, 64, 64), np.uint8), np.zeros((64, 64, 3))],
)
def test_other_arrays_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        read(picture)
