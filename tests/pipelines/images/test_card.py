"""Other readers open a table's folder and see exactly its rows, whatever files lie beside them."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines.admin.takedown import TakedownConfig, take_down
from pipelines.cli.config import build
from pipelines.images.card import FILE, write_card
from pipelines.images.features import feature_row
from pipelines.images.plans import write_chunks
from pipelines.images.random_access import ROW
from pipelines.images.rows import (
    IMAGE_ROW,
    JOINED_ROW,
    LATENT_ROW,
    PAIR_ROW,
    RECONSTRUCTION_ROW,
    with_image_feature,
)
from pipelines.images.runs import Run
from pipelines.ingest.plan import chunk_file
from pipelines.recaption import card as caption_card
from pipelines.storage.parquet import write_parquet
from pipelines.storage.tables import PARTS, Table
from tests.pipelines.earlier import as_of_earlier_version

Rows = list[dict[str, Any]]
HOME = "/home/of/somebody"  # no card may contain it
SCHEMAS = {
    "image": with_image_feature(IMAGE_ROW),
    "pair": with_image_feature(PAIR_ROW),
    "latents": LATENT_ROW,
    "features": feature_row(2, ["aesthetic"]),
    "reconstruction": with_image_feature(RECONSTRUCTION_ROW),
    "caption": with_image_feature(JOINED_ROW),
}
SETTINGS = {"filter.min_aesthetic": 5.5, "data.input": {f"{HOME}/list.parquet": "1 byte"}}
MODEL = {"base_models": {}, "step": 1, "weights": "w", "fingerprint": "f", "image_size": 8}


def rows_of(kind: str) -> list[Rows]:
    """The rows of three chunks: none; one failed row; two `ok` rows."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    failed = {"key": 1, "status": "decode:corrupt", "error": "cut"}
    good: dict[str, Any] = {"status": "ok"}
    if kind == "latents":
        words = (np.arange(8, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()  # bfloat16
        good |= {"mean": words, "deviation": words}
    elif kind == "features":
        good |= {"features": [0.5, -2.0], "aesthetic": 6.5}
    else:
        good |= {"image": {"bytes": buffer.getvalue(), "path": None}}
    if kind == "caption":
        good |= {"name": "1.png"}
    if kind in ("pair", "caption"):
        good |= {"caption": "A red field."}
    if kind in ("image", "pair"):
        good |= {"url": "http://a.org/1.png", "aesthetic": 6.5, "run": 1}
    return [[], [failed], [{**good, "key": -5}, {**good, "key": 2}]]


def finished(folder: Path, kind: str) -> Table:
    """A finished table of a kind, with every file that its jobs may write beside the rows."""
    table, schema = Table(folder / kind), SCHEMAS[kind]
    identity = {
        "data.input": f"{HOME}/images",
        "files": f"{HOME}/x",
        "image.size": 32,
        "none": None,
    }
    identity |= {"latent_shape": [2, 2, 2], "base_models": {"vae": "sha256:1"}}
    table.create(kind, identity, 3, files=[f"{HOME}/images/part-000000.parquet"])
    for chunk, rows in enumerate(rows_of(kind)):
        table.write(chunk, pa.Table.from_pylist(rows, schema), row_group_size=1)
    (table.folder / "_plan").mkdir()
    write_chunks(table.folder, [np.zeros(2, ROW)] * 3)
    if kind == "image":
        run = Run(table.folder / "_runs/0001", 1)
        run.begin(SETTINGS, [0], read=40, dropped={"no_url": 1}, fetched=3, marked=0)
        run.plan_folder.mkdir()
        write_parquet(
            chunk_file(run.plan_folder, 0), pa.table({"key": [77]})
        )  # of a run in progress
        (run.folder / "link_rot.csv").write_text("host,rows\na.org,77\n")
    for name in ("_report.html", "captions.json", "_health.json", "_similar.csv"):
        (table.folder / name).write_text(json.dumps({"key": 77, "words": {}, "tokens": {}}))
    if kind == "caption":
        (table.folder / "_health.json").unlink()
        content = {"model": MODEL, "license": "mit", "join": True, "generate": {}, "gate": {}}
        table.publish(content)
        caption_card.write_card(table)
    write_card(table)
    return table


@pytest.fixture(params=list(SCHEMAS))
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    return finished(tmp_path, request.param)


def by_key(rows: Any) -> Rows:
    return sorted(rows, key=lambda row: row["key"])


def expected(table: Table) -> Rows:
    return by_key(row for chunk in range(3) for row in pq.read_table(table.part(chunk)).to_pylist())


def test_datasets_opens_the_folder(table: Table, tmp_path: Path) -> None:
    import datasets

    rows = expected(table)
    assert [row["key"] for row in rows] == [-5, 1, 2]
    for streaming in (False, True):
        cache = str(tmp_path / "cache")
        opened = datasets.load_dataset(
            str(table.folder), split="train", streaming=streaming, cache_dir=cache
        )
        if "image" in rows[0]:
            assert isinstance(opened.features["image"], datasets.Image)
            assert [row["image"] and row["image"].size for row in by_key(opened)] == [
                (4, 3), None, (4, 3),
            ]  # fmt: skip
            opened = opened.cast_column("image", datasets.Image(decode=False))
        assert by_key(opened) == rows


READERS: dict[str, Callable[[Path], Rows]] = {}


def reader(read: Callable[[Path], Rows]) -> Callable[[Path], Rows]:
    READERS[read.__name__] = read
    return read


@reader
def polars_folder(folder: Path) -> Rows:
    import polars

    return polars.scan_parquet(folder / PARTS).collect().to_dicts()


@reader
def polars_glob(folder: Path) -> Rows:
    import polars

    return polars.read_parquet(f"{folder}/**/*.parquet").to_dicts()


@reader
def duckdb_glob(folder: Path) -> Rows:
    import duckdb

    return duckdb.sql(f"select * from '{folder}/**/*.parquet'").to_arrow_table().to_pylist()


@reader
def pandas_folder(folder: Path) -> Rows:
    import pandas as pd

    frame = pd.read_parquet(folder / PARTS, dtype_backend="pyarrow")
    return pa.Table.from_pandas(frame, preserve_index=False).to_pylist()


@pytest.mark.parametrize("name", list(READERS))
def test_parquet_readers_see_only_the_rows(table: Table, name: str) -> None:
    assert by_key(READERS[name](table.folder)) == expected(table)


@pytest.mark.usefixtures("ray_local")
def test_ray_data_sees_only_the_rows(tmp_path: Path) -> None:
    import ray

    for kind in SCHEMAS:
        table = finished(tmp_path, kind)
        rows = expected(table)
        read = ray.data.read_parquet(str(table.parts))
        assert read.count() == len(rows)
        assert read.schema().names == list(rows[0])
        if kind in ("image", "latents"):  # running a task takes seconds
            keys = [(row["key"], row["status"]) for row in by_key(read.take_all())]
            assert keys == [(row["key"], row["status"]) for row in rows]


def test_card_describes_the_table(table: Table) -> None:
    text = (table.folder / FILE).read_text()
    assert HOME not in text
    header = yaml.safe_load(text.split("---")[1])
    assert header["size_categories"] == ["n<1K"]
    assert [column["name"] for column in header["dataset_info"]["features"]] == list(
        expected(table)[0]
    )
    assert "| decode:corrupt | 1 |" in text
    assert "| ok | 2 |" in text
    for line in text.partition("## Columns")[2].strip().splitlines()[2:]:
        assert len(line.split("|")[3].strip()) > 3, line  # each column has a meaning
    if table.describe()["kind"] != "caption":
        assert "| image.size | 32 |" in text
        assert "| base_models.vae | sha256:1 |" in text
    if table.describe()["kind"] == "image":
        assert "| filter.min_aesthetic | 5.5 |" in text
        assert "| 1 | 40 | 1 | 3 | 0 |" in text  # the run


HOSTILE_NAMES = [
    "a: 'b' \"c\" {d} #e",
    "---\nlicense: mit\n---",
    "été 图 🖼",
    "[x](a.org) <b>",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_the_hub_reads_the_card_of_any_name(tmp_path: Path, name: str) -> None:
    from huggingface_hub import DatasetCard

    table = finished(tmp_path, "reconstruction")
    table = Table(table.folder.rename(tmp_path / name))
    write_card(table)
    read = DatasetCard.load(table.folder / FILE)
    data = read.data.to_dict()
    assert (data["pretty_name"], data.get("license")) == (name, None)
    assert data["tags"] == ["vlv", "arxiv:2507.07104", "synthetic"]
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert read.text.splitlines()[1].startswith("# ")
    assert not re.search(r"(?<!\\)\]\(|<b>", read.text.splitlines()[1])  # no link, no markup
    (code, *_) = re.findall(r"load_dataset\((.*?), split", read.text)
    assert ast.literal_eval(code) == f"path/to/{name}"


def test_code_in_the_card_of_latents_works(tmp_path: Path) -> None:
    table = finished(tmp_path, "latents")
    code = re.findall(r"```python\n(.*?)```", (table.folder / FILE).read_text(), re.DOTALL)[-1]
    names: dict[str, Any] = {"rows": expected(table)}
    exec(code, names)
    assert names["mean"].float().tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_code_in_the_card_of_features_works(tmp_path: Path) -> None:
    table = finished(tmp_path, "features")
    code = re.findall(r"```python\n(.*?)```", (table.folder / FILE).read_text(), re.DOTALL)[-1]
    names: dict[str, Any] = {"rows": expected(table)}
    exec(code, names)
    assert names["values"].tolist() == [[0.5, -2.0]] * 2


def test_takedown_updates_the_card_and_an_unchanged_card_is_not_rewritten(tmp_path: Path) -> None:
    images, pairs = (finished(tmp_path, kind) for kind in ("image", "pair"))
    cards = [table.folder / FILE for table in (images, pairs)]
    before = [card.stat().st_mtime_ns for card in cards]
    write_card(images)
    write_card(pairs, pairs.counts())
    assert [card.stat().st_mtime_ns for card in cards] == before
    named = {"table": str(images.folder), "keys": [2], "derived": [str(pairs.folder)]}
    assert list(take_down(build(TakedownConfig, named)).values()) == [1, 1]
    for card in cards:
        assert "| ok | 1 |" in card.read_text()


def test_no_card_if_arrow_would_read_it_as_a_part(tmp_path: Path) -> None:
    """Not in a table of an earlier version; nor is there one before the table is finished."""
    table = finished(tmp_path, "image")
    (table.folder / FILE).unlink()
    (table.folder / "_commits/000002.json").unlink()
    write_card(table)
    assert not (table.folder / FILE).exists()
    table.write(2, pq.read_table(table.part(2)))
    earlier = as_of_earlier_version(table)
    write_card(earlier)
    assert not (table.folder / FILE).exists()
    earlier.create("image", {}, 3)  # as a job does that continues it
    assert Table(table.folder).parts == table.folder
