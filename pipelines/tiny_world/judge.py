"""Reads a scene from the pixels of an image, without learned weights and without `scenes.draw`.

The judge fits two objects to the image by matching pursuit. An object is a template (a shape with a half
side and a position) times one free colour, on a uniform background. The judge takes the template that
leaves the smallest sum of squares, subtracts it, and repeats.

This is robust for images sampled by a model: soft edges and halos affect all templates alike, a uniform
colour shift has no effect, touching objects are separated by colour or shape, and of three objects the
two strongest are read. The judge always gives the most likely value of an attribute; only a missing
object has None.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.tiny_world.scenes import BACKGROUNDS, COLOURS, RADIUS, RELATIONS, SHAPES, SIDE

Pair = tuple[str | None, str | None]
Words = tuple[str | None, str | None, str | None]
Floats = NDArray[np.floating]  # float32 for large arrays

LARGE_FROM = (RADIUS["small"][1] + RADIUS["large"][0]) / 2  # half side, in pixels
LEAST_MASS = 20.0  # least pixels of full colour of an object; drawn objects have over 100
MAX_RESIDUAL = 0.1  # share of the image's sum of squares; drawn scenes leave 0.04 to 0.06
BORDER = 2  # width of the frame from which the background is read, in pixels

_NOTHING: Words = (None, None, None)
_FINE_RADII = tuple(
    radius
    for low, high in RADIUS.values()  # also slightly smaller and larger than drawn objects
    for radius in (low - 0.75, (low + high) / 2, high + 0.75)
)
_FINE_SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # around the result of the coarse search, in pixels
_REACH = 16  # half side of the window that holds every shifted template
_GRID = 48  # side of the coarse search's FFTs, large enough that no template wraps around
_SAMPLES = 8  # per pixel and axis, for antialiased templates


@dataclass(frozen=True)
class Reading:
    """The attributes read from an image or a caption; None: not found.

    `size`, `colour` and `shape` are pairs, of the first and the second object.
    """

    size: Pair
    colour: Pair
    shape: Pair
    relation: str | None
    background: str | None


@dataclass(frozen=True)
class _Fit:
    """A template and its colour, in the window around the pixel corner (row, column)."""

    row: int
    column: int
    template: int
    contrast: Floats  # [3], colour minus background
    mass: float  # explained sum of squares, in squared steps of 255


def read(picture: NDArray[np.uint8]) -> Reading:
    """Read an image `[64 64 3]`, uint8.

    Objects are ordered along the axis that separates their centres more, which gives the relation. A
    single object is the first if it is in the left or upper half, else the second. Raises ValueError for
    another shape or type.
    """
    if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
        raise ValueError(
            f"expected uint8 [{SIDE} {SIDE} 3], got {picture.dtype} {list(picture.shape)}"
        )
    pixels = picture.astype(np.float32)
    inner = np.zeros((SIDE, SIDE), dtype=bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    level = np.median(pixels[~inner], axis=0)
    background = _nearest(level, BACKGROUNDS)
    contrast = np.pad(pixels - level, ((_REACH, _REACH), (_REACH, _REACH), (0, 0)))

    objects = []
    for fit in _two_best(contrast):
        colour = _colour(fit, contrast, background)
        full = _full_contrast(colour, background)
        if fit.mass >= LEAST_MASS * float(full @ full):
            objects.append((fit, colour))
    return _reading(objects, background)


def _reading(fits: list[tuple[_Fit, str]], background: str) -> Reading:
    """The attributes of at most two fitted objects."""
    bank = _fine_bank()
    objects: list[tuple[NDArray[np.float64], Words]] = []  # centre (x, y), words
    for fit, colour in fits:
        shape, radius, x, y = bank.labels[fit.template]
        words = ("large" if radius > LARGE_FROM else "small", colour, shape)
        objects.append((np.array([fit.column + x, fit.row + y]), words))
    first, second, relation = _NOTHING, _NOTHING, None
    if len(objects) == 2:
        axis = int(np.abs(objects[1][0] - objects[0][0]).argmax())
        relation = RELATIONS[axis]  # along x: left of; along y: above
        first, second = (words for _, words in sorted(objects, key=lambda item: item[0][axis]))
    elif objects:
        offset = objects[0][0] - SIDE / 2
        if offset[np.abs(offset).argmax()] < 0:
            first = objects[0][1]
        else:
            second = objects[0][1]
    sizes, colours, shapes = zip(first, second, strict=True)
    return Reading(sizes, colours, shapes, relation, background)


def _colour(fit: _Fit, contrast: Floats, background: str) -> str:
    """The palette colour nearest to the median of the template's inner pixels.

    Each palette colour is compared at its best strength from 0 to 1, so that pale objects keep their
    colour. Edge pixels are mixed colours and do not count.
    """
    core = _fine_bank().masks[fit.template] > 0.9
    median = np.median(contrast[_window(fit.row, fit.column)].reshape(-1, 3)[core], axis=0)
    scaled = {}
    for name in COLOURS:
        full = _full_contrast(name, background)
        scaled[name] = np.clip(median @ full / (full @ full), 0, 1) * full
    return _nearest(median, scaled)


def _full_contrast(colour: str, background: str) -> NDArray[np.float64]:
    """Colour minus background `[3]`."""
    return np.subtract(COLOURS[colour], BACKGROUNDS[background], dtype=np.float64)


def _nearest(colour: Floats, palette: Mapping[str, Any]) -> str:
    """The name of the nearest palette colour by Euclidean distance."""
    return min(palette, key=lambda name: float(((colour - palette[name]) ** 2).sum()))


# -------------------------------------------------------------------------------------- fitting


def _two_best(contrast: Floats) -> list[_Fit]:
    """The two templates that together leave the smallest residual.

    A large template between two small touching objects may explain more than either of them. So if the
    residual is large, the search is repeated with a small template first.

    contrast `[96 96 3]`: the image minus its background, with a margin of `_REACH` zeros.
    """
    fits, rest = _greedy(contrast, tuple(RADIUS))
    if _sum_of_squares(rest) > MAX_RESIDUAL * _sum_of_squares(contrast):
        attempts = [(fits, rest), _greedy(contrast, ("small",))]
        fits, rest = min(attempts, key=lambda attempt: _sum_of_squares(attempt[1]))
    for i, fit in enumerate(fits):  # refine each without the other
        _add(rest, fit, 1)
        fits[i] = _fine(rest, *_pixel_corner(fit))
        _add(rest, fits[i], -1)
    return fits


def _greedy(contrast: Floats, first: tuple[str, ...]) -> tuple[list[_Fit], Floats]:
    """Two fits, the first with templates of these sizes, and the residual."""
    rest = contrast.copy()
    fits: list[_Fit] = []
    for sizes in (first, tuple(RADIUS)):
        fits.append(_fine(rest, *_coarse(rest, sizes)))
        _add(rest, fits[-1], -1)
    return fits, rest


def _sum_of_squares(rest: Floats) -> float:
    return float((rest**2).sum())


def _coarse(rest: Floats, sizes: tuple[str, ...]) -> tuple[int, int]:
    """Row and column of the pixel corner where a template of medium size explains most."""
    side = SIDE // 2
    inside = rest[_REACH:-_REACH, _REACH:-_REACH].transpose(2, 0, 1)
    spectrum = np.fft.rfft2(_half(inside), s=(_GRID, _GRID))
    most: Floats = np.zeros((side, side), dtype=np.float32)
    for size in sizes:
        spectra, norms = _coarse_bank(size)
        products = np.fft.irfft2(spectrum * spectra[:, None], s=(_GRID, _GRID))
        explained = (products[..., :side, :side] ** 2).sum(1) / norms[:, None, None]
        most = np.maximum(most, explained.max(0))
    row, column = np.unravel_index(most.argmax(), most.shape)
    return 2 * int(row), 2 * int(column)


def _fine(rest: Floats, row: int, column: int) -> _Fit:
    """The template that explains most around a pixel corner."""
    bank = _fine_bank()
    products = bank.masks @ rest[_window(row, column)].reshape(-1, 3)
    explained = (products**2).sum(1) / bank.norms
    best = int(explained.argmax())
    return _Fit(row, column, best, products[best] / bank.norms[best], float(explained[best]))


def _half(planes: Floats) -> Floats:
    """Planes `[n h w]` at half scale."""
    rows = planes[:, ::2] + planes[:, 1::2]
    return (rows[..., ::2] + rows[..., 1::2]) / 4


def _pixel_corner(fit: _Fit) -> tuple[int, int]:
    """The pixel corner nearest to the centre of a fit, within the picture."""
    _, _, x, y = _fine_bank().labels[fit.template]
    row, column = np.clip(np.rint([fit.row + y, fit.column + x]), 0, SIDE - 1)
    return int(row), int(column)


def _add(rest: Floats, fit: _Fit, sign: int) -> None:
    """Add a fitted object to the residual (sign 1) or subtract it (-1)."""
    mask = _fine_bank().masks[fit.template].reshape(2 * _REACH, 2 * _REACH, 1)
    rest[_window(fit.row, fit.column)] += sign * mask * fit.contrast


def _window(row: int, column: int) -> tuple[slice, slice]:
    """The slices of the padded image within `_REACH` of a pixel corner."""
    return slice(row, row + 2 * _REACH), slice(column, column + 2 * _REACH)


# ------------------------------------------------------------------------------------ templates


@dataclass(frozen=True)
class _Bank:
    """Templates as rows: masks `[n 1024]`, their sums of squares `[n]`, (shape, radius, x, y)."""

    masks: Floats
    norms: Floats
    labels: list[tuple[str, float, float, float]]


@cache
def _fine_bank() -> _Bank:
    """Every shape of every fine radius at every shift."""
    labels = list(itertools.product(SHAPES, _FINE_RADII, _FINE_SHIFTS, _FINE_SHIFTS))
    masks = np.stack([_mask(*label).ravel() for label in labels])
    return _Bank(masks, (masks**2).sum(1), labels)


@cache
def _coarse_bank(size: str) -> tuple[NDArray[np.complexfloating], Floats]:
    """Conjugate spectra `[4 48 25]` of the shapes at half scale, and their sums of squares."""
    radius, side = sum(RADIUS[size]) / 2, _REACH
    masks = _half(np.stack([_mask(shape, radius, 0, 0) for shape in SHAPES]))
    grid = np.zeros((len(masks), _GRID, _GRID), dtype=np.float32)
    grid[:, :side, :side] = masks
    grid = np.roll(grid, (-side // 2, -side // 2), axis=(1, 2))  # the centre to the origin
    return np.fft.rfft2(grid).conj(), (masks**2).sum((1, 2))


def _mask(shape: str, radius: float, x: float, y: float) -> Floats:
    """The share of each pixel that a shape covers, `[32 32]`; (x, y) is its offset from the centre.

    Slightly blurred: with sharp templates, small soft crosses are read as circles.
    """
    n = 2 * _REACH * _SAMPLES
    samples = (np.arange(n) + 0.5) / _SAMPLES - _REACH
    u, v = (samples[None, :] - x) / radius, (samples[:, None] - y) / radius
    covered = _inside(shape, u, v).reshape(2 * _REACH, _SAMPLES, 2 * _REACH, _SAMPLES)
    mask = covered.mean((1, 3), dtype=np.float32)
    for axis in (0, 1) * 2:  # [1 2 1] / 4 twice along both axes: a blur of 1 px
        mask = (np.roll(mask, 1, axis) + 2 * mask + np.roll(mask, -1, axis)) / 4
    return mask


def _inside(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the points in [-1, 1] x [-1, 1], v downwards, that the shape covers."""
    far, near = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    inside = {
        "circle": u**2 + v**2 <= 1,
        "square": far <= 0.8,
        "triangle": (abs(u) <= (v + 1) / 1.9) & (v <= 0.9),
        "cross": (far <= 1) & (near <= 0.34),
    }
    return inside[shape]
