"""Scenes of the tiny world: two objects, a relation and a background, drawn and captioned.

    a large red circle left of a small blue square on a gray background

A scene consists of its attributes only, so scenes and captions correspond one to one. Exact positions and
sizes are drawn from a seed, within bounds that keep size and relation unambiguous:

- every shape fits a square of half side r; large r is 13 to 14 px, small r 9.5 to 10.5 px;
- along the axis of the relation, objects are near a quarter and three quarters of the image, at least
  1 px apart; across it, near the middle; each is shifted by up to 3 px both ways;
- so across the axis their centres differ by less than half of their distance along it.

A hash of its attributes assigns a scene to a split, whatever the seed. Four of the 40 colour-shape pairs
are not in training or validation; all scenes with one of them are in the test split (`is_held_out`).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

SIZES = ("large", "small")
# With only six colours, two thirds of captions with an unseen pair were right (docs/experiments.md).
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 50, 180),
    "cyan": (60, 200, 220),
    "orange": (250, 130, 20),
    "pink": (250, 150, 200),
    "brown": (120, 70, 30),
    "lime": (150, 235, 40),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "above")
# Phrases have equally many words, so that later words have the same position in all captions.
# Otherwise stage 1 learned everything but the relation (docs/experiments.md).
PHRASES = {"left of": "left of", "above": "just above"}
BACKGROUNDS = {"black": (16, 16, 16), "gray": (128, 128, 128), "white": (240, 240, 240)}

HELD_OUT = frozenset(
    [("red", "triangle"), ("green", "cross"), ("blue", "circle"), ("yellow", "square")]
)
"""Colour-shape pairs that only the test split has; each colour and shape occurs in training."""

SIDE = 64  # of the image, in pixels
RADIUS = {"large": (13.0, 14.0), "small": (9.5, 10.5)}
MARGIN = 1.0  # between an object and the edge
GAP = 1.0  # least distance between objects along the relation's axis
APART = 31.0  # distance between the objects' centres before jitter
JITTER = 3.0  # largest shift of a centre, both ways
SUPERSAMPLING = 4  # drawn this much larger, then averaged, for antialiasing

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Of 20 parts of the scenes without a held-out pair: 17 train, 1 validation, 2 test.
_PARTS: tuple[Split, ...] = ("train",) * 17 + ("validation",) + ("test",) * 2


@dataclass(frozen=True)
class Object:
    """An object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The content of a caption: `first` is left of, or above, `second`."""

    first: Object
    second: Object
    relation: str
    background: str


# ------------------------------------------------------------------------------------- captions


def caption(scene: Scene) -> str:
    """The caption of a scene; `parse` is the exact inverse."""
    return _sentence(scene, PHRASES[scene.relation])


def _sentence(scene: Scene, relation: str) -> str:
    return f"a {scene.first} {relation} a {scene.second} on a {scene.background} background"


def _object_pattern(name: str) -> str:
    words = (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES))
    return " ".join(f"(?P<{name}_{part}>{'|'.join(choices)})" for part, choices in words)


_CAPTION = re.compile(
    f"a {_object_pattern('first')} (?P<relation>{'|'.join(PHRASES.values())}) "
    f"a {_object_pattern('second')} on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


def parse(text: str) -> Scene | None:
    """The scene of a caption, or None if the text is not in the grammar."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        return None
    words = match.groupdict()
    first, second = (
        Object(*(words[f"{name}_{part}"] for part in ("size", "colour", "shape")))
        for name in ("first", "second")
    )
    relation = next(name for name, phrase in PHRASES.items() if phrase == words["relation"])
    return Scene(first, second, relation, words["background"])


# --------------------------------------------------------------------------------------- splits


def is_held_out(scene: Scene) -> bool:
    """Whether an object has a colour-shape pair that is not in training."""
    return any((o.colour, o.shape) in HELD_OUT for o in (scene.first, scene.second))


def split_of(scene: Scene) -> Split:
    """The split of a scene, which depends only on the scene."""
    if is_held_out(scene):
        return "test"
    # Hashes the attributes, not the caption: new wording must not move scenes between splits.
    words = _sentence(scene, scene.relation)
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return _PARTS[int.from_bytes(digest, "big") % len(_PARTS)]


@cache
def scenes_of(split: Split, held_out: bool = False) -> tuple[Scene, ...]:
    """All scenes of a split with or without a held-out pair, in a fixed order.

    Train 26,452, validation 1,549, test 3,103 without a held-out pair and 7,296 with one.
    """
    objects = [Object(*words) for words in itertools.product(SIZES, COLOURS, SHAPES)]
    everything = itertools.product(objects, objects, RELATIONS, BACKGROUNDS)
    scenes = (Scene(*parts) for parts in everything)
    return tuple(s for s in scenes if split_of(s) == split and is_held_out(s) == held_out)


def sample(seed: int, n: int, split: Split = "train") -> list[Scene]:
    """`n` scenes of a split in a random order that depends on the seed.

    Scenes repeat only after all were used. In the test split every second scene (positions 1, 3, …) has
    a held-out colour-shape pair.
    """
    if split != "test":
        return list(itertools.islice(_shuffled(seed, split, held_out=False), n))
    seen, unseen = (_shuffled(seed, split, held_out) for held_out in (False, True))
    return [next(unseen if i % 2 else seen) for i in range(n)]


def _shuffled(seed: int, split: Split, held_out: bool) -> Iterator[Scene]:
    rng = np.random.default_rng([seed, SPLITS.index(split), held_out])
    pool = scenes_of(split, held_out)
    while True:
        for i in rng.permutation(len(pool)):
            yield pool[i]


# -------------------------------------------------------------------------------------- drawing


def draw(scene: Scene, seed: int) -> Image.Image:
    """Draw the scene as an antialiased RGB image of 64x64; `seed` decides exact positions and sizes."""
    scale = SUPERSAMPLING
    picture = Image.new("RGB", (SIDE * scale, SIDE * scale), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(picture)
    for thing, (x, y, r) in zip(
        (scene.first, scene.second), object_positions(scene, seed), strict=True
    ):
        outline = [(scale * (x + r * u), scale * (y + r * v)) for u, v in _outline(thing.shape)]
        canvas.polygon(outline, fill=COLOURS[thing.colour])
    return picture.reduce(scale)


def object_positions(scene: Scene, seed: int) -> list[tuple[float, float, float]]:
    """Centre and half side (x, y, r) of both objects in `draw`, in pixels."""
    rng = np.random.default_rng(seed)
    positions = []
    radii = [rng.uniform(*RADIUS[thing.size]) for thing in (scene.first, scene.second)]
    for anchor, r in zip((SIDE / 2 - APART / 2, SIDE / 2 + APART / 2), radii, strict=True):
        room = min(JITTER, SIDE / 2 - APART / 2 - MARGIN - r, (APART - GAP - sum(radii)) / 2)
        along = anchor + rng.uniform(-room, room)
        across = SIDE / 2 + rng.uniform(-JITTER, JITTER)
        positions.append((along, across, r) if scene.relation == "left of" else (across, along, r))
    return positions


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape in [-1, 1] x [-1, 1], y downwards."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        return tuple(zip(np.cos(angles).tolist(), np.sin(angles).tolist(), strict=True))
    if shape == "square":
        return ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
    if shape == "triangle":
        return ((0.0, -1.0), (1.0, 0.9), (-1.0, 0.9))
    a = 0.34  # half the width of the cross's arms
    quarter = [(-a, -1.0), (a, -1.0), (a, -a), (1.0, -a)]
    half = [*quarter, (1.0, a), (a, a)]
    return (*half, *((-u, -v) for u, v in half))
