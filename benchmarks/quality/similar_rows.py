"""Recall of duplicates by meaning against all pairs, on vectors with planted copies.

    python -m benchmarks.quality.similar_rows --rows 20000 --width 768

The vectors lie in a narrow cone, as CLIP's do, once in 100 groups and once in none. A tenth of the rows
are copies of others with noise. All pairs are compared for the truth, so rows² · 4 bytes pass by in blocks.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.embed import duplicates
from pipelines.embed.duplicates import find_duplicates
from pipelines.images.features import FEATURES, KIND, FeatureTable, as_vectors, feature_row
from pipelines.storage.tables import Table

BOUNDS = (0.9, 0.95, 0.98)


def vectors_with_copies(rows: int, width: int, groups: int, seed: int) -> np.ndarray:
    """float32 `[rows width]`; random pairs have a cosine of about 0.5, copies one of 0.85 to 0.999."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, width)) + rng.normal(size=width)
    if groups:
        features += rng.normal(size=(groups, width))[rng.integers(groups, size=rows)]
    copies = rows // 10
    noise = rng.uniform(0.05, 0.6, (copies, 1)) * rng.normal(size=(copies, width))
    features[-copies:] = features[rng.integers(rows - copies, size=copies)] + noise
    return features.astype(np.float32)


def all_pairs(keys: np.ndarray, features: np.ndarray) -> dict[int, float]:
    """The largest cosine of each row with a row of a smaller key, by key."""
    order = np.argsort(keys)
    unit = features[order] / np.linalg.norm(features[order], axis=1, keepdims=True)
    best = []
    for start in range(0, len(unit), 1024):
        cosines = unit[start : start + 1024] @ unit[: start + 1024].T
        earlier = (
            np.arange(cosines.shape[1])[None] < np.arange(start, start + len(cosines))[:, None]
        )
        best.append(np.where(earlier, cosines, -1).max(axis=1))
    return dict(zip(keys[order].tolist(), np.concatenate(best).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--cluster-rows", type=int, default=duplicates.CLUSTER_ROWS)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    duplicates.CLUSTER_ROWS = given.cluster_rows
    for groups, seed in itertools.product((100, 0), range(given.seeds)):
        features = vectors_with_copies(given.rows, given.width, groups, seed)
        keys = np.random.default_rng(seed).integers(-(2**63), 2**63, given.rows)
        with tempfile.TemporaryDirectory() as folder:
            table = FeatureTable(_write(Path(folder), keys, features))
            start = time.perf_counter()
            found = dict(
                zip(*(a.tolist() for a in find_duplicates(table, min(BOUNDS))), strict=True)
            )
            seconds = time.perf_counter() - start
        truth = all_pairs(keys, features)
        for bound in BOUNDS:
            expected = {key for key, cosine in truth.items() if cosine >= bound}
            marked = {key for key, cosine in found.items() if cosine >= bound}
            print(
                f"groups {groups:3d}, seed {seed}, bound {bound:.2f}: recall "
                f"{len(marked & expected) / len(expected):.4f} of {len(expected):,}, "
                f"{len(marked - expected)} wrong, {seconds:.1f} s",
                flush=True,
            )


def _write(folder: Path, keys: np.ndarray, features: np.ndarray) -> str:
    table, count = Table(folder / "t"), len(keys)
    rows = pa.table(
        {
            "key": keys,
            "name": [str(key) for key in keys],
            "status": ["ok"] * count,
            "error": pa.nulls(count, pa.string()),
            FEATURES: as_vectors(features),
        },
        schema=feature_row(features.shape[1]),
    )
    table.create(KIND, {}, 1)
    table.write(0, rows)
    return str(table.folder)


if __name__ == "__main__":
    main()
