"""Figures of pictures: distances of two feature tables, and of each picture to its original.

Memory holds a batch, a covariance, and a sample of each table (`measure.sample_rows`), however many
rows there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.evaluate.config import MeasureConfig
from pipelines.evaluate.figures import Direction, Figure, Scores, keys_hash, mean_figure
from pipelines.evaluate.gaussians import Moments, frechet_distance, frechet_of_samples
from pipelines.evaluate.kernels import cmmd, kernel_distances, normalised
from pipelines.images.features import FeatureTable, join_features
from pipelines.storage.sorting import spread_keys
from vlv_model.errors import DataError

FRECHET = {"inception": "FID", "dinov2": "FD-DINOv2"}
PAIRED = {"clip": "CLIP image cosine", "dinov2": "DINOv2 cosine"}


class Sample:
    """The features of the keys with the least hashes: the same rows in any order and sharding."""

    def __init__(self, most: int, width: int) -> None:
        self._most = most
        self.keys, self.features = np.zeros(0, np.int64), np.zeros((0, width), np.float32)

    def add(self, keys: np.ndarray, features: np.ndarray) -> None:
        self.keys = np.concatenate([self.keys, keys])
        self.features = np.concatenate([self.features, features])
        order = np.argsort(spread_keys(self.keys), kind="stable")[: self._most]
        self.keys, self.features = self.keys[order], self.features[order]


@dataclass(frozen=True)
class Gathered:
    """What one pass over a table keeps."""

    moments: Moments
    sample: Sample
    keys: np.ndarray

    @staticmethod
    def of(table: FeatureTable, most: int) -> Gathered:
        width = table.width or 0
        gathered = Gathered(Moments(width), Sample(most, width), np.zeros(table.rows, np.int64))
        pending: list[Any] = []
        seen = 0
        for batch in table.batches():
            gathered.moments.add(batch.features)
            gathered.keys[seen : seen + len(batch.keys)] = batch.keys
            seen += len(batch.keys)
            pending.append(batch)
            if sum(len(one.keys) for one in pending) >= most:
                _flush(gathered.sample, pending)
        _flush(gathered.sample, pending)
        return gathered


def _flush(sample: Sample, pending: list[Any]) -> None:
    if pending:
        sample.add(
            np.concatenate([batch.keys for batch in pending]),
            np.concatenate([batch.features for batch in pending]),
        )
        pending.clear()


def check_same_extractor(made: FeatureTable, original: FeatureTable) -> None:
    """Raise DataError, naming the first difference, if features of two tables do not compare."""
    for name in {**made.extractor, **original.extractor}:
        one, other = made.extractor.get(name), original.extractor.get(name)
        if one != other:
            raise DataError(
                f"{made.path} and {original.path} do not compare: {name} is {one} there and {other} "
                "here; embed one of them again (jobs/embed.py)"
            )


def provenance(*tables: FeatureTable) -> dict[str, Any]:
    """What made the features: extractor, digest, resize, precision, stored type, versions."""
    return {
        "extractor": tables[0].extractor,
        "features": "float32",
        "sums": "float64",
        "versions": [table.versions for table in tables],
    }


def distances(
    subject: str,
    label: str,
    made: tuple[FeatureTable, Gathered],
    original: tuple[FeatureTable, Gathered],
    measure: MeasureConfig,
) -> Iterator[Figure]:
    """FID and KID, FD-DINOv2 or CMMD of two tables of the same extractor."""
    kind = made[0].extractor.get("extractor", "")
    one, other = made[1], original[1]
    least = min(len(one.keys), len(other.keys))
    if least < 4:
        raise DataError(
            f"{made[0].path} and {original[0].path} have {least} rows in the smaller one: a distance "
            "of two sets needs 4 or more"
        )
    keys = keys_hash(one.keys)
    base = {
        **provenance(made[0], original[0]),
        "originals": {"n": len(other.keys), "keys": keys_hash(other.keys)},
    }

    def figure(
        name: str,
        value: float,
        ends: tuple[float, float] | None,
        interval: str,
        n: int,
        **more: Any,
    ) -> Figure:
        low, high = ends or (None, None)
        better: Direction = "lower"
        return Figure(
            subject, label, name, value, low, high, interval, n, better, keys, {**base, **more}
        )

    samples = one.sample.features, other.sample.features
    if kind == "clip":
        sizes = f"no interval; {len(samples[0]):,} and {len(samples[1]):,} rows"
        yield figure("CMMD", cmmd(*samples), None, sizes, len(samples[0]), sample=len(samples[0]))
        return
    name = FRECHET.get(kind, f"Fréchet ({kind})")
    whole = frechet_distance(one.moments, other.moments)
    yield figure(name, whole, None, "all rows; its spread is the next line", len(one.keys))
    rows = measure.subsample_rows or min(2000, min(map(len, samples)) // 2)
    rows = min(rows, *map(len, samples))
    values = _subsampled(*samples, rows, measure)
    yield figure(
        f"{name} of {rows:,} images",
        float(values.mean()),
        (float(values.min()), float(values.max())),
        f"least and greatest of {measure.subsamples} seeded subsamples",
        rows,
        seed=measure.seed,
        subsamples=values.tolist(),
    )
    if kind == "inception":
        subset = min(measure.kid_subset_rows, min(map(len, samples)) // 2)
        found = kernel_distances(*samples, subset, measure.kid_subsets, measure.seed)
        # KID is a thousandth of what is read comfortably: published tables give 1000 times it.
        mean, deviation = 1000 * float(found.mean()), 1000 * float(found.std())
        yield figure(
            "KID × 1000",
            mean,
            (mean - deviation, mean + deviation),
            f"± one deviation of {measure.kid_subsets} subsets of {subset:,}",
            len(samples[0]),
            seed=measure.seed,
            subset=subset,
            subsets=measure.kid_subsets,
        )


def _subsampled(x: np.ndarray, y: np.ndarray, rows: int, measure: MeasureConfig) -> np.ndarray:
    # One seed per subsample: those of two models with the same keys are of the same images.
    values = []
    for number in range(measure.subsamples):
        rng = np.random.default_rng([measure.seed, number])
        chosen = rng.choice(len(y), rows, replace=False)
        other = chosen if len(x) == len(y) else rng.choice(len(x), rows, replace=False)
        values.append(frechet_of_samples(x[other], y[chosen]))
    return np.array(values)


def paired_cosines(made: FeatureTable, original: FeatureTable) -> Scores:
    """The cosine of the features of each key that two tables of the same width share."""
    keys, values = [np.zeros(0, np.int64)], [np.zeros(0)]
    for one, other in join_features(made, original):
        keys.append(one.keys)
        values.append((normalised(one.features) * normalised(other.features)).sum(axis=1))
    return Scores.of(np.concatenate(keys), np.concatenate(values))


def table_scores(table: FeatureTable, name: str) -> Scores:
    """A score column of a table, such as `aesthetic`."""
    keys, values = [np.zeros(0, np.int64)], [np.zeros(0)]
    for rows in table.columns([name]):
        keys.append(rows["key"].to_numpy())
        values.append(rows[name].to_numpy())
    return Scores.of(np.concatenate(keys), np.concatenate(values))


def picture_figures(
    subject: str,
    label: str,
    made: FeatureTable,
    original: tuple[FeatureTable, Gathered] | None,
    measure: MeasureConfig,
) -> Iterator[Figure]:
    """All figures of a table of pictures' features; without `original` those of its scores alone."""

    def mean(name: str, scores: Scores, better: Direction, about: Mapping[str, Any]) -> Figure:
        return mean_figure(
            subject, label, name, scores, better, measure.seed, measure.resamples, about
        )

    kind = made.extractor.get("extractor", "")
    for name in made.scores:
        scores = table_scores(made, name)
        if len(scores.keys):
            yield mean(name, scores, "higher" if name == "aesthetic" else "", provenance(made))
    if original is None or made.width is None:
        return
    yield from distances(
        subject, label, (made, Gathered.of(made, measure.sample_rows)), original, measure
    )
    if kind in PAIRED:
        pairs = paired_cosines(made, original[0])
        if len(pairs.keys):
            yield mean(PAIRED[kind], pairs, "higher", provenance(made, original[0]))
