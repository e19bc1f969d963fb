"""Compares two captioners or models on the same images, in figures and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.evaluate.config import MeasureConfig
from pipelines.evaluate.figures import Figure, keys_hash
from pipelines.evaluate.intervals import Interval, mean_interval, share_interval
from pipelines.evaluate.subjects import CaptionTable
from pipelines.evaluate.texts import agreement

_TELLING = {
    "CLIP score, by sentence": 0,
    "CLIP score": 1,
    "DINOv2 cosine": 2,
    "CLIP image cosine": 3,
}
"""Which verdict stands first: CIDEr-D says little of captions that are longer than the references."""


@dataclass(frozen=True)
class Comparison:
    """One measure of two subjects, pair by pair."""

    measure: str
    table: str
    first: str  # subjects
    second: str
    wins: int  # pairs in which the second is better
    losses: int
    ties: int
    share: Interval  # of pairs that the second wins
    difference: Interval  # mean of second − first
    keys: np.ndarray
    first_values: np.ndarray
    second_values: np.ndarray
    of_images: bool = True  # keys are those of images, not of questions

    @property
    def n(self) -> int:
        return len(self.keys)

    @property
    def winner(self) -> str | None:
        """The better one, or None where the interval of the share holds one half."""
        low, high = self.share.low, self.share.high
        if low is None or high is None or low <= 0.5 <= high:
            return None
        return self.second if low > 0.5 else self.first

    @property
    def verdict(self) -> str:
        """In words, such as `B is better: 62 % of pairs, interval 57–67 %`."""
        low, high = self.share.low or 0.0, self.share.high or 0.0
        if self.winner is None:
            return (
                f"no difference can be seen: {self.second} is better in {_percent(self.share.value)} of "
                f"{self.n:,} pairs, interval {_range(low, high)}"
            )
        share, ends = self.share.value, (low, high)
        if self.winner == self.first:
            share, ends = 1 - share, (1 - high, 1 - low)
        return f"{self.winner} is better: {_percent(share)} of {self.n:,} pairs, interval {_range(*ends)}"

    def extremes(self, count: int) -> tuple[list[int], list[int]]:
        """Positions of the largest differences for the second and for the first, largest first."""
        gain = self.second_values - self.first_values
        # Sorted by key too, so that a rerun shows the same images.
        up = np.lexsort((self.keys, -gain))[:count]
        down = np.lexsort((self.keys, gain))[:count]
        return [int(i) for i in up if gain[i] > 0], [int(i) for i in down if gain[i] < 0]

    def to_json(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "table": self.table,
            "first": self.first,
            "second": self.second,
            "n": self.n,
            "keys": keys_hash(self.keys),
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "share": vars(self.share),
            "difference": vars(self.difference),
            "verdict": self.verdict,
        }


def compare(first: Figure, second: Figure, measure: MeasureConfig) -> Comparison | None:
    """Two figures of the same measure, with higher values better; None without a common key."""
    if first.scores is None or second.scores is None:
        raise ValueError(f"{first.measure} has no scores by key")
    keys, one, two = first.scores.common(second.scores)
    if not len(keys):
        return None
    gain = two - one
    # Cosines of equal texts differ in the last digit of float32.
    close = np.isclose(one, two, rtol=1e-6, atol=1e-9)
    wins, losses = int((~close & (gain > 0)).sum()), int((~close & (gain < 0)).sum())
    ties = len(keys) - wins - losses
    return Comparison(
        first.measure,
        first.table,
        first.subject,
        second.subject,
        wins,
        losses,
        ties,
        share_interval(wins, ties, len(keys)),
        mean_interval(gain, measure.seed, measure.resamples),
        keys,
        one,
        two,
        first.of_images,
    )


def compare_all(figures: Sequence[Figure], measure: MeasureConfig) -> list[Comparison]:
    """Each subject with the first one, in every measure whose higher values are better."""
    found = []
    subjects = list(dict.fromkeys(figure.subject for figure in figures))
    scored = [f for f in figures if f.scores is not None and f.better == "higher"]
    for second in subjects[1:]:
        for one in (figure for figure in scored if figure.subject == subjects[0]):
            others = [f for f in scored if f.subject == second and f.measure == one.measure]
            same = [f for f in others if f.table == one.table]
            # A folder may name its only table of a measure as it likes.
            alone = sum(f.subject == one.subject and f.measure == one.measure for f in scored) == 1
            partner = same or (others if alone and len(others) == 1 else [])
            if partner and (comparison := compare(one, partner[0], measure)) is not None:
                found.append(comparison)
    return sorted(found, key=lambda one: _TELLING.get(one.measure, 9))


def compare_subsamples(figures: Sequence[Figure]) -> list[str]:
    """In how many seeded subsamples the distance of each subject is below the first one's, in words."""
    lines = []
    drawn = [figure for figure in figures if "subsamples" in figure.made]
    for one in drawn:
        for other in drawn:
            same = (one.measure, one.table, one.n) == (other.measure, other.table, other.n)
            if not same or one.subject == other.subject or one.subject != figures[0].subject:
                continue
            pairs = list(zip(one.made["subsamples"], other.made["subsamples"], strict=True))
            lower = sum(b < a for a, b in pairs)
            where = f" ({one.table})" if one.table else ""
            lines.append(
                f"{one.measure}{where}: {other.subject} is lower than {one.subject} in {lower} of "
                f"{len(pairs)} seeded subsamples"
            )
    return lines


@dataclass(frozen=True)
class Agreement:
    """How alike the captions of two captioners are."""

    first: str
    second: str
    same_words: Interval  # F1 of shared words
    identical: float  # share of captions
    n: int


def captions_agree(
    first: tuple[str, CaptionTable], second: tuple[str, CaptionTable], measure: MeasureConfig
) -> Agreement | None:
    """Over the images that both have captioned; None if there is none."""
    one, other = first[1].captions, second[1].captions
    common = sorted(one.keys() & other.keys())
    if not common:
        return None
    values = np.array([agreement(one[key], other[key]) for key in common])
    identical = sum(one[key] == other[key] for key in common) / len(common)
    interval = mean_interval(values, measure.seed, measure.resamples)
    return Agreement(first[0], second[0], interval, identical, len(common))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.0f}–{100 * high:.0f} %"
