"""The ingest job on a local Ray: each planned row once, also after interruptions."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli.config import build
from pipelines.images.random_access import RowIndex, RowReader
from pipelines.images.rows import IMAGE_ROW, url_key
from pipelines.images.runs import last_run
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.decoder import image_columns
from pipelines.ingest.job import ingest
from pipelines.lists.filters import FilterConfig
from pipelines.pictures.encode import ImageConfig
from pipelines.storage.files import as_path, write_atomically
from pipelines.storage.parquet import read_parquet_file
from pipelines.storage.tables import Table, parquet_files
from pipelines.tiny_world.dataset import write_world
from pipelines.tiny_world.server import Web, serve
from tests.pipelines.ingest.sites import HEADERS_ALONE
from tests.pipelines.pictures.files import photograph
from vlv_model.errors import DataError, RunError
from vlv_model.squares import Square

REPO = Path(__file__).parents[3]
SETTINGS: dict[str, Any] = {
    "download": {
        "allow_private": True,
        "total_timeout": 9,
        "retries": 0,
        "respect_optout": HEADERS_ALONE,
    },
    "image": {"size": 64, "format": "png"},
    "rows_per_chunk": 16,
    "ray": {"address": "in-process"},
}
ON_RAY: dict[str, Any] = {"ray": {}}


def config_of(tmp_path: Path, **settings: Any) -> IngestConfig:
    data = {"input": str(tmp_path / "metadata.parquet"), "output": str(tmp_path / "out")}
    return build(IngestConfig, {"data": data, **SETTINGS, **settings})


def rows_of(tmp_path: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in parquet_files(str(tmp_path / "out")))


def write_urls(tmp_path: Path, urls: list[str]) -> None:
    pq.write_table(pa.table({"URL": urls}), tmp_path / "metadata.parquet")


def check_exactly_once(tmp_path: Path) -> pa.Table:
    """Checks that each URL is one row, sorted by key, and that `ok` rows have valid images."""
    rows = rows_of(tmp_path)
    listed = pq.read_table(tmp_path / "metadata.parquet")["URL"].to_pylist()
    assert rows["key"].to_pylist() == sorted(url_key(url) for url in listed)
    assert set(rows["url"].to_pylist()) == set(listed)
    for row in rows.to_pylist():
        assert (row["status"] == "ok") == (row["image"] is not None)
        if row["image"]:
            assert Image.open(BytesIO(row["image"]["bytes"])).size == (row["width"], row["height"])
    return rows


@pytest.mark.usefixtures("ray_local")
def test_a_list_becomes_a_table_and_reruns_add_new_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a cluster; test_reruns.py has the details of reruns."""
    with serve(tmp_path) as web:
        write_world(tmp_path, web.base_url, 40, num_broken=8)
        counts = ingest(config_of(tmp_path, **ON_RAY))
        assert "allow_private" in capsys.readouterr().err
        asked = sum(web.requests.values())
        assert ingest(config_of(tmp_path, **ON_RAY)) == counts
        assert sum(web.requests.values()) == asked == 48
    assert list(counts) == ["ok", *sorted(set(counts) - {"ok"})]
    assert counts == {
        "ok": 40,
        "decode:corrupt": 1,
        "download:http_404": 1,
        "download:http_410": 1,
        "download:http_5xx": 1,
        "download:not_an_image": 1,
        "download:opted_out": 1,
        "download:timeout": 1,
        "download:too_large": 1,
    }
    rows = check_exactly_once(tmp_path)
    assert rows.schema.equals(IMAGE_ROW)
    files = parquet_files(str(tmp_path / "out"))
    keys = [pq.read_table(file, columns=["key"])["key"].to_pylist() for file in files]
    assert all(before[-1] < after[0] for before, after in itertools.pairwise(keys))
    failed = rows.filter(pc.not_equal(rows["status"], "ok")).to_pylist()
    assert all(row["error"] and row["sha256"] is None for row in failed)
    good = rows.filter(pc.equal(rows["status"], "ok"))
    assert None not in good["phash"].to_pylist() + good["sha256"].to_pylist()
    assert min(good["aesthetic"].to_pylist()) >= 6
    with serve(tmp_path) as web:
        listed = pq.read_table(tmp_path / "metadata.parquet")
        one = listed.slice(0, 1).set_column(0, "URL", [[web.url("new.png")]])
        pq.write_table(pa.concat_tables([listed, one]), tmp_path / "metadata.parquet")
        assert ingest(config_of(tmp_path, **ON_RAY)) == {**counts, "download:http_404": 2}
        assert dict(web.requests) == {"/new.png": 1}
    again = check_exactly_once(tmp_path)
    new = again.filter(pc.equal(again["run"], 2))
    assert new["url"].to_pylist() == one["URL"].to_pylist()
    assert again.filter(pc.equal(again["run"], 1)).equals(rows)


def test_row_groups_are_small(tmp_path: Path) -> None:
    with serve(tmp_path) as web:
        write_world(tmp_path, web.base_url, 40)
        ingest(config_of(tmp_path, rows_per_chunk=64))
    (file,) = parquet_files(str(tmp_path / "out"))
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [16, 16, 8]


def test_other_readers_read_the_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    duckdb = pytest.importorskip("duckdb")
    polars = pytest.importorskip("polars")
    with serve(tmp_path) as web:
        write_world(tmp_path, web.base_url, 9, num_broken=1)
        ingest(config_of(tmp_path, rows_per_chunk=4))
    # What a user writes who knows of a folder of Parquet files, and no more.
    files, cache = str(tmp_path / "out/**/*.parquet"), str(tmp_path / "cache")
    table = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=cache)
    pictures = {row["key"]: row["image"] for row in table if row["status"] == "ok"}
    assert [picture.size for picture in pictures.values()] == [(64, 64)] * 9
    question = f"SELECT key, image.bytes, status FROM '{files}' WHERE status = 'ok'"
    by_duckdb = {key: content for key, content, _ in duckdb.sql(question).fetchall()}
    by_polars = polars.scan_parquet(files).filter(polars.col("status") == "ok").collect()
    by_pandas = pd.read_parquet(tmp_path / "out/data")  # the folder itself
    assert len(by_pandas) == 10
    by_pandas = by_pandas[by_pandas["status"] == "ok"]
    found = [
        by_duckdb,
        dict(zip(by_polars["key"], by_polars["image"].struct.field("bytes"), strict=True)),
        dict(zip(by_pandas["key"], (image["bytes"] for image in by_pandas["image"]), strict=True)),
    ]
    for images in found:
        assert images.keys() == pictures.keys()
        for key, content in images.items():
            assert Image.open(BytesIO(content)).tobytes() == pictures[key].tobytes()
    counts = duckdb.sql(f"SELECT status, count(*) FROM '{files}' GROUP BY status").fetchall()
    assert dict(counts) == Table(tmp_path / "out").counts()
    card = (tmp_path / "out/README.md").read_text()
    assert "9 usable images, of 10 URLs" in card
    assert str(tmp_path) not in card


def test_a_stopped_run_continues_with_its_pending_chunks(tmp_path: Path) -> None:
    with serve(tmp_path) as web:
        write_world(tmp_path, web.base_url, 64)
        ingest(config_of(tmp_path))
        whole = rows_of(tmp_path)
        table = Table(tmp_path / "out")
        # As if killed: chunk 1 was never begun, of chunk 2 the part is there and no commit.
        table.part(1).unlink()
        for chunk in (1, 2):
            (table.folder / "_commits" / f"{chunk:06d}.json").unlink()
        table.part(2).write_bytes(b"half a part")
        web.requests.clear()
        assert ingest(config_of(tmp_path)) == {"ok": 64}
        assert sum(web.requests.values()) == 2 * 16
    # Another run fetched them, so `run` differs.
    assert check_exactly_once(tmp_path).drop(["run"]).equals(whole.drop(["run"]))


@pytest.mark.end_to_end
def test_a_killed_job_is_continued(forked_python: Path, tmp_path: Path) -> None:
    """After SIGKILL of the driver, the same command finishes."""
    with serve(tmp_path) as web:
        write_world(tmp_path, web.base_url, 300, num_broken=8)
        command = [forked_python, "jobs/ingest.py", f"data.input={tmp_path}/metadata.parquet"]
        command += [f"data.output={tmp_path}/out", "download.allow_private=true", "image.size=64"]
        command += ["download.total_timeout=3", "download.retries=0", "rows_per_chunk=8"]
        command += ["download.concurrency=2", "ray.num_cpus=2"]
        environment = os.environ | {"PYTHONPATH": str(REPO)}
        job = subprocess.Popen(command, cwd=REPO, env=environment, start_new_session=True)
        commits = tmp_path / "out/_commits"
        deadline = time.monotonic() + 300  # a start takes long where other jobs run beside it
        while not list(commits.glob("*.json")) and time.monotonic() < deadline:
            assert job.poll() is None, (
                f"the job ended with {job.returncode} before its first commit"
            )
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGKILL)  # the driver, and the Ray that it started
        job.wait()
        done = len(list(commits.glob("*.json")))
        assert 0 < done < 39
        again = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr[-2000:]
    assert check_exactly_once(tmp_path).num_rows == 308
    said = again.stdout.splitlines()
    assert f"image table: {tmp_path}/out" in said[-3]
    assert said[-2] == f"report: {tmp_path}/out/_report.html"
    assert said[-1].startswith("8 rows failed: retry=transient tries 2 of them again, ")


@pytest.mark.parametrize("source", ["made", "shared"])
def test_photographs_are_cropped_to_the_size(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if source == "made":
        folder = tmp_path / "photographs"
        folder.mkdir()
        for number in range(24):
            side = 132 + 9 * number
            size = (side, 400 - side) if side < 200 else (side, 200)
            photograph(*size, seed=number).save(folder / f"{number}.jpg")
    else:
        folder = request.getfixturevalue("shared_dir") / "photos/images"
    with serve(folder, port=0) as web:
        names = sorted(p.name for p in folder.glob("*.jpg"))[:24]
        write_urls(tmp_path, [web.url(name) for name in names])
        download = {"allow_private": True}  # its time-outs, which no photograph may run into
        counts = ingest(config_of(tmp_path, image={"size": 128}, download=download))
    assert counts == {"ok": 24}
    rows = check_exactly_once(tmp_path)
    assert set(rows["width"].to_pylist()) == set(rows["height"].to_pylist()) == {128}
    assert min(rows["original_width"].to_pylist()) > 128


def test_rows_of_image_filters_keep_the_size_and_no_bytes() -> None:
    file = BytesIO()
    Image.fromarray(np.zeros((40, 100, 3), np.uint8)).save(file, "PNG")
    for limits, found in (
        ({"min_short_side": 41}, "filtered:short_side"),
        ({"max_aspect_ratio": 2.0}, "filtered:aspect_ratio"),
        ({"min_short_side": 40, "max_aspect_ratio": 2.5}, "ok"),
    ):
        row = image_columns(file.getvalue(), ImageConfig(), FilterConfig(**limits))
        assert row["status"] == found
        assert (row["original_width"], row["original_height"]) == (100, 40)
        assert len(row["sha256"]) == 64
        assert ("image" in row) == (found == "ok")


def test_bad_input_is_refused_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ingest(config_of(tmp_path))
    write_urls(tmp_path, [])
    with pytest.raises(DataError, match="has no rows"):
        ingest(config_of(tmp_path))
    pq.write_table(pa.table({"TEXT": ["x"]}), tmp_path / "metadata.parquet")
    with pytest.raises(DataError, match="no column 'url'; it has TEXT"):
        ingest(config_of(tmp_path))
    # … and none of these stands in the way of a good list.
    assert not Table(tmp_path / "out").exists
    assert not Table(tmp_path / "out").check_same_run("image", {})


def test_the_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    with serve(tmp_path) as web:
        write_world(tmp_path, web.base_url, 2)
        ingest(config_of(tmp_path))
        with pytest.raises(RunError, match=r"image\.size: 64 there, 32 here"):
            ingest(config_of(tmp_path, image={"size": 32, "format": "png"}))


def test_dropped_rows_are_counted_in_the_table(tmp_path: Path, web_of_two: Web) -> None:
    urls = [web_of_two.url(f"{i}.png") for i in (0, 1, 1)]
    columns = {"URL": [*urls, None], "aesthetic": [6.0, 7.0, 7.0, 9.0]}
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    assert ingest(config_of(tmp_path, filter={"min_aesthetic": 6.5})) == {"ok": 1}
    run = last_run(Table(tmp_path / "out"))
    assert run is not None
    about = run.describe()
    assert (about["read"], about["fetched"], about["counts"]) == (4, 1, {"ok": 1})
    assert about["dropped"] == {"filtered:aesthetic": 1, "no_url": 1, "repeated_url": 1}


@pytest.fixture
def web_of_two(tmp_path: Path) -> Any:
    folder = tmp_path / "two"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    with serve(folder) as web:
        yield web


@pytest.mark.usefixtures("ray_local")
def test_a_list_and_a_table_in_an_object_store(tmp_path: Path, bucket: str) -> None:
    with serve(tmp_path) as web:
        write_world(tmp_path, web.base_url, 20, num_broken=2)
        write_atomically(
            as_path(f"{bucket}/lists/a.parquet"), (tmp_path / "metadata.parquet").read_bytes()
        )
        data = {"input": f"{bucket}/lists", "output": f"{bucket}/tables/images"}
        config = build(IngestConfig, {"data": data, **SETTINGS, **ON_RAY})
        counts = ingest(config)
        assert counts["ok"] == 20
        asked = sum(web.requests.values())
        table = Table(data["output"])
        as_path(f"{bucket}/tables/images/_commits/000001.json").unlink()  # as a kill leaves it
        assert table.pending() == [1]
        # Workers have reached the store by now.
        assert ingest(build(IngestConfig, {"data": data, **SETTINGS})) == counts
        assert asked < sum(web.requests.values()) < 2 * asked
    rows = pa.concat_tables(read_parquet_file(file) for file in parquet_files(data["output"]))
    listed = pq.read_table(tmp_path / "metadata.parquet")["URL"].to_pylist()
    assert rows["key"].to_pylist() == sorted(url_key(url) for url in listed)
    index = RowIndex.open(parquet_files(data["output"]))
    assert RowReader(index).square(3, Square(64)).shape == (3, 64, 64)
