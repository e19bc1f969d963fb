"""The whole evaluation, from tables to the report."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.cli.config import load
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.job import evaluate
from pipelines.images.features import FEATURES, KIND, as_vectors, feature_row
from pipelines.images.rows import CAPTION_ROW
from pipelines.storage.tables import Table
from tests.pipelines.foreign import png
from vlv_model.errors import DataError, RunError

N, WIDTH = 400, 12
KEYS = np.random.default_rng(9).integers(-(2**62), 2**62, N)
CLIP = {"extractor": "clip", "weights": "sha256:c", "preprocess": {"size": 224}}
INCEPTION = {"extractor": "inception", "weights": "sha256:i", "resize": "pytorch"}


def write_features(
    folder: Path,
    features: np.ndarray,
    extractor: dict[str, object],
    keys: np.ndarray = KEYS,
    seen: float | None = None,
    rows_per_chunk: int = 150,
) -> None:
    table = Table(folder)
    identity = {f"embed.{name}": value for name, value in extractor.items()}
    starts = range(0, len(keys), rows_per_chunk)
    table.create(KIND, identity, len(starts), versions={"torch": "2.13"})
    scores = [] if seen is None else ["seen"]
    schema = feature_row(features.shape[1], scores)
    columns = {
        "key": pa.array(keys, pa.int64()),
        "name": pa.array([str(key) for key in keys]),
        "status": pa.array(["ok"] * len(keys)),
        "error": pa.nulls(len(keys), pa.string()),
        FEATURES: as_vectors(features),
        **{name: pa.array([seen] * len(keys), pa.float32()) for name in scores},
    }
    rows = pa.table(columns, schema=schema)
    for chunk, start in enumerate(starts):
        table.write(chunk, rows.slice(start, rows_per_chunk))


def write_captions(folder: Path, captions: list[str]) -> None:
    table = Table(folder)
    table.create("caption", {}, 1)
    rows = [
        {"key": int(k), "caption": c, "status": "ok"} for k, c in zip(KEYS, captions, strict=True)
    ]
    table.write(0, pa.Table.from_pylist(rows, schema=CAPTION_ROW))
    table.publish({})


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Originals, and two captioners of which `good` is closer to them."""
    rng = np.random.default_rng(0)
    original = rng.normal(size=(N, WIDTH)).astype(np.float32)
    write_features(tmp_path / "originals/clip", original, CLIP)
    write_features(tmp_path / "originals/inception", original, INCEPTION)
    for name, noise in (("good", 0.5), ("bad", 1.0)):
        close = (original + noise * rng.normal(size=(N, WIDTH))).astype(np.float32)
        # Another order and other parts than the originals'.
        order = rng.permutation(N)
        write_features(
            tmp_path / name / "clip-text",
            close[order],
            {"extractor": "clip-text", "weights": "sha256:c", "window": 77},
            KEYS[order],
            seen=0.25,
            rows_per_chunk=90,
        )
        for guidance, extra in ((1, 0.4), (2, 0.0), (3, 0.2)):
            write_features(
                tmp_path / name / f"guidance-{guidance}/inception", close * (1 + extra), INCEPTION
            )
        odd = "a red dog" if name == "good" else "some <b>cat</b>"
        captions = [f"{odd if i % 2 else 'a red dog'} number {i}" for i in range(N)]
        write_captions(tmp_path / name / "captions", captions)
    images = [png("red" if i % 2 else "blue") for i in range(N)]
    pq.write_table(
        pa.table({"key": KEYS, "image": [{"bytes": image, "path": None} for image in images]}),
        tmp_path / "images.parquet",
        row_group_size=50,
    )
    pq.write_table(
        pa.table(
            {
                "key": np.repeat(KEYS, 2),
                "caption": [
                    text for i in range(N) for text in (f"A red dog, number {i}.", "a dog")
                ],
            }
        ),
        tmp_path / "references.parquet",
    )
    return tmp_path


def config(tables: Path, *settings: str) -> EvaluateConfig:
    given = {"input": [str(tables / "bad"), str(tables / "good")]}
    paths = [f"output={tables / 'report'}", f"data.originals={tables / 'originals'}"]
    return load(
        EvaluateConfig,
        None,
        [
            *paths,
            "measure.subsamples=4",
            "measure.kid_subsets=3",
            "measure.resamples=200",
            *settings,
        ],
        given,
    )


def test_the_better_captioner_is_named(tables: Path) -> None:
    settings = config(
        tables,
        f"data.references={tables / 'references.parquet'}",
        f"data.images={tables / 'images.parquet'}",
    )
    said = evaluate(settings)
    report = json.loads((tables / "report/report.json").read_text())
    scores = pq.read_table(tables / "report/scores.parquet")
    page = (tables / "report/report.html").read_text()

    verdict = next(c for c in report["comparisons"] if c["measure"] == "CLIP score")
    assert verdict["verdict"].startswith("good is better: ")
    assert verdict["n"] == N
    assert f"CLIP score: {verdict['verdict']}" in said
    assert verdict["verdict"] in page
    # Recomputed from the stored scores.
    one, other = (
        {r["key"]: r["value"] for r in scores.to_pylist()
         if (r["subject"], r["measure"]) == (name, "CLIP score")}
        for name in ("bad", "good")
    )  # fmt: skip
    assert verdict["wins"] == sum(other[key] > one[key] for key in one)
    assert verdict["share"]["low"] > 0.5

    def values(measure: str, subject: str) -> list[float]:
        return [f["value"] for f in report["figures"]
                if (f["measure"], f["subject"]) == (measure, subject)]  # fmt: skip

    assert all(g < b for g, b in zip(values("FID", "good"), values("FID", "bad"), strict=True))
    assert values("FID", "good")[1] == min(values("FID", "good"))  # at guidance 2
    assert values("CIDEr-D", "good")[0] > values("CIDEr-D", "bad")[0]
    assert values("words", "bad") == [5.5]  # "<b>cat</b>" has three
    assert report["agreements"][0]["identical"] == 0.5
    assert "good is lower than bad in 4 of 4 seeded subsamples" in said
    fid = next(f for f in report["figures"] if f["measure"] == "FID")
    assert fid["made"]["extractor"] == INCEPTION
    assert fid["n"] == N
    assert len(fid["keys"]) == 16
    assert fid["made"]["versions"] == [{"torch": "2.13"}] * 2
    assert fid["made"]["sums"] == "float64"
    assert "CLIP sees 25 % of a caption" in page
    assert page.count("data:image/") == 12
    assert "<b>cat" not in page

    assert evaluate(settings) == "evaluated already: nothing to do"
    with pytest.raises(RunError, match=r"measure.seed: 0 there, 1 here"):
        evaluate(config(tables, "measure.seed=1"))


def test_no_difference_is_said_where_none_can_be_seen(tables: Path) -> None:
    rng = np.random.default_rng(3)
    for name in ("one", "two"):
        write_features(
            tables / name,
            rng.normal(size=(N, WIDTH)).astype(np.float32),
            {"extractor": "clip-text", "weights": "sha256:c"},
        )
    given = {"input": [str(tables / "one"), str(tables / "two")]}
    paths = [f"output={tables / 'same'}", f"data.originals={tables / 'originals'}"]
    said = evaluate(load(EvaluateConfig, None, paths, given))
    assert "CLIP score: no difference can be seen: two is better in " in said


def test_a_dry_run_lists_the_tables_and_writes_nothing(tables: Path) -> None:
    said = evaluate(config(tables, "dry_run=true"))
    assert "guidance-1/inception: 400 features of inception, 12 wide" in said
    assert "memory: about 0.3 GB" in said
    assert not (tables / "report").exists()


def test_features_of_other_settings_are_refused(tables: Path) -> None:
    write_features(
        tables / "other", np.ones((N, WIDTH), np.float32), {**INCEPTION, "resize": "clean"}
    )
    given = {"input": [str(tables / "other")]}
    paths = [f"output={tables / 'r'}", f"data.originals={tables / 'originals'}"]
    with pytest.raises(
        DataError, match=r"resize is clean there and pytorch here; embed one of them"
    ):
        evaluate(load(EvaluateConfig, None, paths, given))
    with pytest.raises(DataError, match="does not exist: give a table, or a folder"):
        evaluate(load(EvaluateConfig, None, paths, {"input": [str(tables / "nothing")]}))
    with pytest.raises(DataError, match="holds no caption or feature table"):
        evaluate(load(EvaluateConfig, None, paths, {"input": [str(tables / "images.parquet")]}))
