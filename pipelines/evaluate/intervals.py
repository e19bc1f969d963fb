"""Intervals: how much a figure would move with another draw of as many images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_EXACT = 100_000  # values; above, the bootstrap of a mean is the normal interval to three digits
_DRAWS = 1 << 22  # indices held at once


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its interval; None where one image gives none."""

    value: float
    low: float | None
    high: float | None
    method: str


def mean_interval(values: np.ndarray, seed: int, resamples: int = 2000) -> Interval:
    """The mean of values `[n]`, n ≥ 1, with the percentile bootstrap of its 95 % interval."""
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(mean, None, None, "one value has no interval")
    if n > _EXACT:
        error = 1.959964 * float(values.std(ddof=1)) / np.sqrt(n)
        return Interval(mean, mean - error, mean + error, "95 %, normal")
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWS // n)
    means = np.concatenate(
        [
            values[rng.integers(0, n, (min(at_once, resamples - done), n))].mean(axis=1)
            for done in range(0, resamples, at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), f"95 %, bootstrap of {resamples:,}")


def share_interval(wins: int, ties: int, n: int) -> Interval:
    """The share of n ≥ 1 pairs that one side wins, where a tie counts as half a win of each side.

    The interval is Clopper and Pearson's (exact, so never narrower than it should be): that of few
    pairs is wide even if all are won, where a bootstrap would have no width at all. Half a win is
    rounded away from the middle.
    """
    share = (wins + ties / 2) / n
    low = _lower_end(int(np.floor(wins + ties / 2)), n)
    high = 1 - _lower_end(int(np.floor(n - wins - ties / 2)), n)
    return Interval(share, low, high, "95 %, exact binomial")


def _lower_end(wins: int, n: int) -> float:
    """The share at which `wins` or more of n have a probability of 2.5 %."""
    if wins == 0:
        return 0.0
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(wins, n + 1)
    ways = logs[n] - logs[k] - logs[n - k]
    low, high = 0.0, wins / n
    for _ in range(60):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        tail = np.exp(ways + k * np.log(middle) + (n - k) * np.log1p(-middle)).sum()
        low, high = (low, middle) if tail > (1 - LEVEL) / 2 else (middle, high)
    return (low + high) / 2
