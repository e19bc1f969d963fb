"""Captions find their images by key and by URL, in any order, and what is left over is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import buckets
from pipelines.config import build
from pipelines.pairs import with_pairs, write_pairs
from pipelines.schemas import IMAGE_ROW, PAIR_ROW, url_key
from pipelines.storage import Table, parquet_files
from pipelines.training.config import Stage2Config
from vlv_model.errors import DataError, RunError

pytestmark = pytest.mark.usefixtures("ray_local")


def url(i: int) -> str:
    return f"http://h.org/{i}.png"


def image_rows(numbers: list[int], failed: tuple[int, ...] = ()) -> pa.Table:
    rows = [
        {
            "key": url_key(url(i)),
            "url": url(i),
            "image": None if i in failed else {"bytes": b"image %d" % i, "path": None},
            "status": "download:timeout" if i in failed else "ok",
        }
        for i in numbers
    ]
    return pa.Table.from_pylist(rows, schema=IMAGE_ROW)


def image_table(folder: Path, count: int, failed: tuple[int, ...] = (), chunk: int = 8) -> str:
    """A table as ingest writes it: sorted by key, in committed parts."""
    rows = image_rows(list(range(count)), failed).sort_by("key")
    table = Table(folder)
    chunks = -(-count // chunk)
    table.create("image", {}, chunks)
    for i in range(chunks):
        table.write(i, rows.slice(i * chunk, chunk))
    return str(folder)


def captions_file(tmp_path: Path, rows: list[dict[str, Any]], name: str = "teacher.parquet") -> str:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    return str(tmp_path / name)


def pairs_of(folder: Path) -> dict[str, str]:
    tables = [pq.read_table(file) for file in parquet_files(str(folder))]
    found = [row for table in tables for row in table.to_pylist()]
    assert all(table.schema.equals(PAIR_ROW) for table in tables)
    assert all(row["image"]["bytes"] and row["key"] == url_key(row["url"]) for row in found)
    assert len({row["key"] for row in found}) == len(found)
    return {row["url"]: row["caption"] for row in found}


@pytest.mark.parametrize("join_on", ["url", "key"])
def test_captions_are_joined_and_counted(tmp_path: Path, join_on: Any) -> None:
    images = image_table(tmp_path / "images", 30, failed=(3, 4))
    texts = {i: f"caption {i}" for i in (*range(20), 77, 78, 79)}
    rows = [{"caption": text, "url": url(i), "key": url_key(url(i))} for i, text in texts.items()]
    rows += [{**rows[0], "caption": "a second one"}]
    rows += [{**rows[0], "url": url(i), "key": url_key(url(i)), "caption": None} for i in (21, 22)]
    rows += [{**rows[0], "url": url(23), "key": url_key(url(23)), "caption": " \n"}]
    counts = write_pairs(
        images, captions_file(tmp_path, rows), str(tmp_path / "pairs"), join_on=join_on
    )
    assert counts == {
        "pairs": 18,
        "images_without_caption": 10,
        "captions_without_image": 5,  # 77, 78, 79 and those of the two images that failed
        "repeated_captions": 1,
        "blank_captions": 3,
    }
    expected = {url(i): text for i, text in texts.items() if i < 20 and i not in (3, 4)}
    assert pairs_of(tmp_path / "pairs") == expected


def test_urls_are_joined_in_any_spelling_of_column_and_host(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 2)
    rows = [{"URL": "HTTP://H.org:80/1.png#x", "TEXT": "web", "answer": "one"}]
    teacher = captions_file(tmp_path, rows)
    write_pairs(images, teacher, str(tmp_path / "pairs"), caption_column="answer")
    assert pairs_of(tmp_path / "pairs") == {url(1): "one"}


def test_chunks_without_a_pair_are_finished_too(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 40)
    teacher = captions_file(tmp_path, [{"url": url(7), "caption": "seven"}])
    assert write_pairs(images, teacher, str(tmp_path / "pairs"))["pairs"] == 1
    table = Table(tmp_path / "pairs")
    assert table.pending() == []
    assert len(table.commits()) == 5


def test_an_unsorted_table_and_many_buckets_give_the_same_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_BUCKET_BYTES", 256)
    monkeypatch.setattr(buckets, "_WAITING_ROWS", 50)
    rng = np.random.default_rng(0)
    order = rng.permutation(300).tolist()
    pq.write_table(image_rows(order), tmp_path / "mine.parquet", row_group_size=64)
    rows = [{"url": url(i), "caption": f"c{i}"} for i in rng.permutation(400).tolist()]
    counts = write_pairs(
        str(tmp_path / "mine.parquet"), captions_file(tmp_path, rows), str(tmp_path / "pairs")
    )
    assert counts["pairs"] == 300
    assert counts["captions_without_image"] == 100
    assert pairs_of(tmp_path / "pairs") == {url(i): f"c{i}" for i in range(300)}
    assert len(list((tmp_path / "pairs/_plan").glob("captions-*.parquet"))) > 4


def test_a_stopped_join_is_continued_and_a_finished_one_kept(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 24)
    teacher = captions_file(tmp_path, [{"url": url(i), "caption": f"c{i}"} for i in range(24)])
    output = str(tmp_path / "pairs")
    counts = write_pairs(images, teacher, output)
    whole = pairs_of(tmp_path / "pairs")
    table = Table(output)
    (table.folder / "_commits/000001.json").unlink()
    table.part(1).write_bytes(b"half")
    others = table.part(0).stat().st_mtime_ns
    assert write_pairs(images, teacher, output) == counts
    assert pairs_of(tmp_path / "pairs") == whole
    assert table.part(0).stat().st_mtime_ns == others


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 3)
    teacher = captions_file(tmp_path, [{"url": url(0), "caption": "x"}])
    output = str(tmp_path / "pairs")
    with pytest.raises(DataError, match="no column 'text'; it has url, caption"):
        write_pairs(images, teacher, output, caption_column="text")
    with pytest.raises(DataError, match="no column 'key'; it has url, caption"):
        write_pairs(images, teacher, output, join_on="key")
    with pytest.raises(DataError, match=r"data\.captions=.* does not exist"):
        write_pairs(images, str(tmp_path / "none.parquet"), output)
    stranger = captions_file(tmp_path, [{"url": "http://x/", "caption": "x"}], "stranger.parquet")
    with pytest.raises(DataError, match=r"none of the 1 captions .* joined by url"):
        write_pairs(images, stranger, output)
    with pytest.raises(RunError, match="holds another run"):
        write_pairs(images, teacher, output)


def test_stage_2_reads_the_joined_table(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 4)
    teacher = captions_file(tmp_path, [{"url": url(1), "words": "one"}])
    data = {"input": images, "captions": teacher, "caption_column": "words", "join_on": "url"}
    config = build(Stage2Config, {"run_dir": str(tmp_path / "run"), "data": data})
    joined = with_pairs(config)
    assert joined.data.input == str(tmp_path / "run/pairs")
    assert (joined.data.captions, joined.data.caption_column) == (None, "caption")
    assert pairs_of(tmp_path / "run/pairs") == {url(1): "one"}
    assert with_pairs(joined) == joined  # captions are in the table already
