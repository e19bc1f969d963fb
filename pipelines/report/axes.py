"""Geometry of the charts, in user units of their SVG, which the browser scales to the column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 440.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 26.0, 16.0, 40.0  # margins for the labels


@dataclass(frozen=True)
class Axis:
    """Maps values from `low`…`high` to user units `start`…`end`."""

    low: float
    high: float
    start: float
    end: float
    most_ticks: int = 6
    whole: bool = False  # ticks at whole numbers only

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels."""
        values = ticks(self.low, self.high, self.most_ticks)
        if self.whole:
            values = [value for value in values if value == int(value)]
        return [(self(v), words) for v, words in zip(values, tick_labels(values), strict=True)]


def horizontal(low: float, high: float) -> Axis:
    """An axis of whole numbers below a chart."""
    return Axis(low, high, LEFT, WIDTH - RIGHT, whole=True)


def vertical(low: float, high: float, most_ticks: int = 6, *, whole: bool = False) -> Axis:
    """An axis beside a chart."""
    return Axis(low, high, HEIGHT - BOTTOM, TOP, most_ticks, whole)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round values (1, 2 or 5 times a power of ten) from low to high."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The values with as many decimals as their distance needs; small ones as `5e-4`."""
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    if step < 1e-3 and max(map(abs, values)) < 0.01:
        return [_with_exponent(value) for value in values]
    if not 1e-4 <= step < 1e7:
        return [f"{value:.4g}" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]


def _with_exponent(value: float) -> str:
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{float(digits):g}e{int(power)}".replace("-", "−") if value else "0"
