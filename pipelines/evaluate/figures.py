"""Figures of an evaluation: values with intervals and all that decides them, and scores by key."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipelines.evaluate.intervals import mean_interval

Direction = Literal["higher", "lower", ""]
"""Which values are better; empty: neither."""


@dataclass(frozen=True)
class Scores:
    """One score per key; keys are unique and sorted."""

    keys: np.ndarray  # int64 [n]
    values: np.ndarray  # float64 [n]

    @staticmethod
    def of(keys: np.ndarray, values: np.ndarray) -> Scores:
        """Sorted; of a key that stands twice, the first."""
        unique, first = np.unique(np.asarray(keys, np.int64), return_index=True)
        return Scores(unique, np.asarray(values, np.float64)[first])

    def common(self, other: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys that both have, and the values of each."""
        keys, one, two = np.intersect1d(
            self.keys, other.keys, assume_unique=True, return_indices=True
        )
        return keys, self.values[one], other.values[two]


@dataclass(frozen=True)
class Figure:
    """A value of one table, as the report and report.json have it."""

    subject: str
    table: str  # below the subject's folder; "" for the folder itself
    measure: str
    value: float
    low: float | None
    high: float | None
    interval: str  # what `low` and `high` are
    n: int
    better: Direction
    keys: str  # hash of the key list
    made: Mapping[str, Any] = field(default_factory=dict)  # seeds, extractor, digests, versions
    scores: Scores | None = None  # per key, where the figure is their mean

    @property
    def of_images(self) -> bool:
        """Whether keys are those of images, not of questions."""
        return "shots" not in self.made

    @property
    def guidance(self) -> float | None:
        """From the name of a folder: `guidance-2`, `guidance=2.5`."""
        for part in self.table.split("/"):
            name, _, number = part.replace("=", "-").rpartition("-")
            if name == "guidance":
                try:
                    return float(number)
                except ValueError:
                    return None
        return None

    def to_json(self) -> dict[str, Any]:
        values = {
            name: getattr(self, name)
            for name in ("subject", "table", "measure", "value", "low", "high", "interval", "n",
                         "better", "keys", "made")
        }  # fmt: skip
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


def keys_hash(keys: np.ndarray) -> str:
    """A hash of a list of int64 keys in any order: 16 hex digits."""
    ordered = np.sort(np.asarray(keys, "<i8"))
    return hashlib.sha256(ordered.tobytes()).hexdigest()[:16]


def mean_figure(
    subject: str,
    table: str,
    measure: str,
    scores: Scores,
    better: Direction,
    seed: int,
    resamples: int,
    made: Mapping[str, Any],
) -> Figure:
    """The mean of scores, at least one, with its bootstrap."""
    found = mean_interval(scores.values, seed, resamples)
    return Figure(
        subject,
        table,
        measure,
        found.value,
        found.low,
        found.high,
        found.method,
        len(scores.keys),
        better,
        keys_hash(scores.keys),
        {**made, "seed": seed, "resamples": resamples},
        scores,
    )
