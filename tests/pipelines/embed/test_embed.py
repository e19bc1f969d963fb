"""The embed job: its tables, resuming, captions, and scores in conditions."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.cli.config import build
from pipelines.embed.config import EmbedConfig, EmbedSettings
from pipelines.embed.predictor import EmbedRows
from pipelines.execution.steps import Chunk
from pipelines.images.features import FeatureTable
from pipelines.images.random_access import RowIndex, RowReader
from pipelines.images.rows import key_of, url_key
from pipelines.images.scores import Scores
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import Table
from tests.pipelines.embed.conftest import Embed
from tests.pipelines.images.test_features import write_features
from vlv_model.errors import ConfigError, DataError, RunError
from vlv_model.features.extractors import load_extractor
from vlv_model.features.settings import ExtractorConfig


def rows_of(path: str) -> list[dict]:  # type: ignore[type-arg]
    return list(read_rows(FeatureTable(path).files, ["key", "name", "status", "error"]))


def features_of(path: str) -> dict[int, np.ndarray]:
    batches = FeatureTable(path).batches()
    return {int(k): f for b in batches for k, f in zip(b.keys, b.features, strict=True)}


def test_each_image_has_the_features_of_its_square(run: Embed, clip: str, pair_table: Path) -> None:
    path = run(pair_table, "t", "embed.extractor=clip", f"embed.weights={clip}",
               "data.limit=40", "data.rows_per_chunk=16", "embed.batch_size=7")  # fmt: skip
    found, table = features_of(path), FeatureTable(path)
    assert len(found) == table.rows == 40
    assert table.extractor["extractor"] == "clip"
    assert table.extractor["weights"].startswith("opened-sha256:")
    assert table.extractor["preprocess"]["size"] == 32
    assert table.versions["torch"] == torch.__version__
    extractor = load_extractor(ExtractorConfig(extractor="clip", weights=clip))
    index = RowIndex.open(sorted(pair_table.glob("*.parquet")))
    reader = RowReader(index)
    for key in list(found)[::13]:
        position = int(np.searchsorted(index.keys, key))
        square = torch.from_numpy(reader.square(position, extractor.square))[None]
        expected = extractor.describe(square)["features"][0].numpy()
        np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-6)
    card = (Path(path) / "README.md").read_text()
    assert "embed.weights" in card
    assert "list: float32" in card


def test_a_job_continues_and_refuses_other_settings(
    run: Embed, clip: str, pair_table: Path
) -> None:
    settings = ["embed.extractor=clip", f"embed.weights={clip}", "data.rows_per_chunk=32"]
    path = run(pair_table, "t", *settings)
    table = Table(path)
    whole = {chunk: pq.read_table(table.part(chunk)) for chunk in range(4)}
    for chunk in (1, 2):  # killed before these commits
        (table.folder / f"_commits/{chunk:06d}.json").unlink()
    table.part(1).unlink()
    untouched = table.part(3).stat().st_mtime_ns
    run(pair_table, "t", *settings, "embed.batch_size=3")
    assert not table.pending()
    assert table.part(3).stat().st_mtime_ns == untouched
    for chunk, before in whole.items():
        after = pq.read_table(table.part(chunk))
        assert after["key"].equals(before["key"])
        assert np.allclose(after["features"].to_pylist(), before["features"].to_pylist(), atol=1e-5)
    with pytest.raises(RunError, match=r"embed\.precision: float32 there, bfloat16 here"):
        run(pair_table, "t", *settings, "embed.precision=bfloat16")


def test_a_file_that_is_no_image_is_a_row(
    run: Embed, clip: str, head: str, tmp_path: Path, pair_table: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    image = pq.read_table(pair_table / "0.parquet")["image"][0].as_py()["bytes"]
    (folder / "good.png").write_bytes(image)
    (folder / "bad.png").write_bytes(image[:200])
    path = run(folder, "t", "embed.extractor=aesthetic", f"embed.weights={clip}",
               f"embed.head={head}")  # fmt: skip
    rows = {row["name"]: row for row in rows_of(path)}
    assert rows["good.png"]["status"] == "ok"
    assert rows["bad.png"]["status"].startswith("decode:")
    table = FeatureTable(path)
    assert (table.rows, table.scores, table.width) == (1, ["aesthetic"], 12)
    # Scores alone are the same scores.
    alone = run(folder, "alone", "embed.extractor=aesthetic", f"embed.weights={clip}",
                f"embed.head={head}", "embed.scores_only=true")  # fmt: skip
    both = [next(FeatureTable(p).columns(["aesthetic"]))["aesthetic"] for p in (path, alone)]
    assert both[0].equals(both[1])
    assert FeatureTable(alone).width is None


def test_captions_are_embedded_by_key(
    run: Embed, clip: str, pair_table: Path, tmp_path: Path
) -> None:
    settings = ["embed.extractor=clip-text", f"embed.weights={clip}", "data.rows_per_chunk=50"]
    listed = pq.read_table(pair_table / "0.parquet", columns=["url", "caption", "status"])
    listed = listed.filter(pa.compute.equal(listed["status"], "ok"))
    pq.write_table(listed.drop_columns(["status"]), tmp_path / "captions.parquet")
    path = run(tmp_path / "captions.parquet", "foreign", *settings, "data.key_column=url",
               "data.where=caption like '%red%'")  # fmt: skip
    texts = {
        url_key(row["url"]): row["caption"] for row in listed.to_pylist() if "red" in row["caption"]
    }
    found = features_of(path)
    assert 0 < len(texts) < listed.num_rows
    assert found.keys() == texts.keys()
    extractor = load_extractor(ExtractorConfig(extractor="clip-text", weights=clip))
    for key in list(texts)[:3]:
        expected = extractor.describe([texts[key]])["features"][0].numpy()
        np.testing.assert_allclose(found[key], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"has no column `key` of integers.*data\.key_column"):
        run(tmp_path / "captions.parquet", "keyless", *settings)
    # COCO's annotations: keys are those of a folder of the files, the first caption of each is taken.
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"id": 3, "image_id": 2, "caption": "a red circle"},
            {"id": 4, "image_id": 1, "caption": "a blue square"},
            {"id": 5, "image_id": 2, "caption": "another"},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    by_name = {"a.jpg": "a blue square", "b.jpg": ["a red circle", "another"]}
    (tmp_path / "names.json").write_text(json.dumps(by_name))
    for file in ("coco", "names"):
        found = features_of(run(tmp_path / f"{file}.json", file, *settings))
        assert found.keys() == {key_of("a.jpg"), key_of("b.jpg")}
        expected = extractor.describe(["a red circle"])["features"][0].numpy()
        np.testing.assert_allclose(found[key_of("b.jpg")], expected, rtol=1e-5, atol=1e-6)
    # A table of ours is read where it lies: no copy of its captions.
    table = Table(tmp_path / "table")
    table.create("caption", {}, 1)
    captions = {"key": [3, 4, 5], "caption": ["a", "b", None], "status": ["ok", "ok", "caption:x"]}
    table.write(0, pa.table({**captions, "error": pa.nulls(3, pa.string())}))
    assert features_of(run(tmp_path / "table", "own", *settings)).keys() == {3, 4}
    assert not (tmp_path / "own/_plan/listing").exists()


def test_scores_select_the_images_of_a_job(
    run: Embed, clip: str, head: str, pair_table: Path
) -> None:
    scored = run(pair_table, "scores", "embed.extractor=aesthetic", f"embed.weights={clip}",
                 f"embed.head={head}", "data.limit=100", "embed.scores_only=true")  # fmt: skip
    (batch,) = FeatureTable(scored).columns(["aesthetic"])
    bound = float(np.median(batch["aesthetic"].to_numpy()))
    good = batch["key"].to_numpy()[batch["aesthetic"].to_numpy() > bound]
    assert 0 < len(good) < 100
    settings = ["embed.extractor=clip", f"embed.weights={clip}", f"data.features={scored}"]
    # The input has a column `aesthetic` of its own, all null; 20 of its images have no score.
    path = run(pair_table, "best", *settings, f"data.where=aesthetic > {bound!r}")
    assert features_of(path).keys() == set(good.tolist())
    with pytest.raises(RunError, match=r"data\.where"):
        run(pair_table, "best", *settings, "data.where=aesthetic > 0")
    with pytest.raises(ConfigError, match=r"data\.features joins scores for data\.where"):
        run(pair_table, "none", *settings)


def test_scores_join_in_any_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = rng.permutation(np.arange(-100, 100)) * 2
    one = write_features(tmp_path / "a", keys.tolist(), rng.normal(size=(200, 2)),
                         failed=[4], scores={"Score": keys / 10}, rows_per_chunk=64)  # fmt: skip
    other = write_features(
        tmp_path / "b", [6], np.zeros((1, 2)), scores={"other": np.array([np.nan])}
    )
    asked = np.array([6, -200, 3, 4, 198])
    rows = pa.table({"name": list("abcde"), "score": [1.0] * 5})
    with Scores([one, other]) as scores:
        joined = scores.join(rows, asked)
    assert joined.column_names == ["name", "Score", "other"]
    assert joined["Score"].to_pylist() == pytest.approx([0.6, -20, None, None, 19.8])
    assert joined["other"].to_pylist() == [None] * 5
    with pytest.raises(ConfigError, match="both have a column 'Score'"):
        Scores([one, one])
    plain = write_features(tmp_path / "c", [1], np.zeros((1, 2)))
    with pytest.raises(DataError, match="has no scores, only features"):
        Scores([plain])


def test_features_that_are_not_finite_fail_their_row(
    clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = EmbedRows(EmbedSettings(extractor="clip", weights=clip), use_gpu=False)
    describe = type(step.extractor).describe

    def damaged(self: object, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        found = describe(step.extractor, batch)
        found["features"][batch[:, 0, 0, 0] == 1, 0] = float("nan")
        return found

    monkeypatch.setattr(type(step.extractor), "describe", damaged)
    pixels = [bytes([value]) * (3 * 32 * 32) if value < 3 else None for value in (0, 1, 3, 2)]
    rows = pa.table(
        {
            "key": [1, 2, 3, 4],
            "name": list("abcd"),
            "pixels": pa.array(pixels, pa.binary()),
            "status": ["ok", "ok", "decode:corrupt", "ok"],
            "error": pa.array([None, None, "why", None], pa.string()),
        }
    )
    done = step(Chunk(0, rows)).rows
    assert done["status"].to_pylist() == ["ok", "embed:failed", "decode:corrupt", "ok"]
    assert done["error"].to_pylist() == [None, "its features are not finite", "why", None]
    assert [value is None for value in done["features"].to_pylist()] == [False, True, True, False]
    with_none = rows.slice(2, 1)
    assert step(Chunk(0, with_none)).rows["features"].to_pylist() == [None]


def test_settings_that_do_not_fit_are_refused() -> None:
    data = {"input": "/a", "output": "/b"}
    for values, expected in [
        ({"data": data}, "setting 'embed.extractor' is required"),
        ({}, "setting 'data.input' is required"),
        ({"data": data, "embed": {"extractor": "clip", "scores_only": True}}, "scores_only needs"),
        (
            {"data": {**data, "text_column": "caption"}, "embed": {"extractor": "clip"}},
            "data.text_column belongs to",
        ),
    ]:
        with pytest.raises(ConfigError, match=expected):
            build(EmbedConfig, values)
