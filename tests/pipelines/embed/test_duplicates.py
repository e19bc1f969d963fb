"""Duplicates by meaning against all pairs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.embed import duplicates
from pipelines.embed.duplicates import find_duplicates
from pipelines.images.features import FeatureTable
from pipelines.storage.tables import Table
from tests.pipelines.embed.conftest import Embed
from tests.pipelines.images.test_features import write_features


def brute_force(keys: np.ndarray, features: np.ndarray, bound: float) -> dict[int, float]:
    """The largest cosine of each row with a row of a smaller key, from all pairs in float64."""
    order = np.argsort(keys)
    unit = features[order].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    best = np.tril(unit @ unit.T, -1).max(axis=1)
    return {int(k): float(c) for k, c in zip(keys[order], best, strict=True) if c >= bound}


def features_with_copies(rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clustered vectors in a narrow cone; the last tenth are copies of others with noise."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(30, width))
    features = centres[rng.integers(30, size=rows)] + rng.normal(size=(rows, width))
    features += rng.normal(size=width)
    tenth = rows // 10
    noise = rng.uniform(0.05, 0.6, (tenth, 1)) * rng.normal(size=(tenth, width))
    features[-tenth:] = features[rng.integers(rows - tenth, size=tenth)] + noise
    keys = rng.integers(-(2**63), 2**63, rows)
    return keys, features.astype(np.float32)


def test_one_cluster_is_exact_and_many_find_nearly_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, features = features_with_copies(2000, 48, seed=0)
    path = write_features(tmp_path / "t", keys.tolist(), features, rows_per_chunk=500)
    expected = brute_force(keys, features, 0.95)
    assert len(expected) > 100
    monkeypatch.setattr(duplicates, "_BLOCK", 300)  # several, the last one shorter
    found, cosines = find_duplicates(FeatureTable(path), 0.95)
    assert found.tolist() == sorted(expected)
    np.testing.assert_allclose(cosines, [expected[key] for key in found.tolist()], atol=1e-5)
    monkeypatch.setattr(duplicates, "CLUSTER_ROWS", 100)  # 20 clusters
    blocked = dict(
        zip(*(a.tolist() for a in find_duplicates(FeatureTable(path), 0.95)), strict=True)
    )
    assert blocked.keys() <= expected.keys()
    assert len(blocked) >= 0.98 * len(expected)
    assert all(cosine <= expected[key] + 1e-5 for key, cosine in blocked.items())


def test_a_job_marks_duplicates_and_marks_again_what_is_new(
    run: Embed, clip: str, tmp_path: Path, pair_table: Path
) -> None:
    images = pq.read_table(pair_table / "0.parquet")["image"].to_pylist()
    contents = [image["bytes"] for image in images if image][:20]
    folder = tmp_path / "files"
    folder.mkdir()
    for number, content in enumerate([*contents, contents[3]]):
        (folder / f"{number:02d}.png").write_bytes(content)
    settings = ["embed.extractor=clip", f"embed.weights={clip}", "embed.duplicates=0.99999",
                "data.rows_per_chunk=6"]  # fmt: skip
    path = run(folder, "t", *settings)
    rows = pa.concat_tables(FeatureTable(path).columns(["name", "duplicate"])).to_pylist()
    marked = {row["name"]: row["duplicate"] for row in rows if row["duplicate"]}
    copies = {"03.png", "20.png"}
    assert len(rows) == 21
    assert len(marked.keys() & copies) == 1  # that with the larger key
    assert marked[(marked.keys() & copies).pop()] == pytest.approx(1, abs=1e-5)
    # Killed while marking: a later attempt completes it, and one more changes nothing.
    table = Table(path)
    (table.folder / "_duplicates.json").unlink()
    column = pa.table({"duplicate": pa.nulls(6, pa.float32()), "status": ["ok"] * 6})
    table.update(1, column)
    run(folder, "t", *settings)
    again = pa.concat_tables(FeatureTable(path).columns(["name", "duplicate"])).to_pylist()
    assert again == rows
    # The condition leaves the copy out.
    kept = run(folder, "kept", "embed.extractor=clip", f"embed.weights={clip}",
               f"data.features={path}", "data.where=duplicate < 0.9999")  # fmt: skip
    names = {
        row["name"] for row in pa.concat_tables(FeatureTable(kept).columns(["name"])).to_pylist()
    }
    assert len(names & copies) == 1
