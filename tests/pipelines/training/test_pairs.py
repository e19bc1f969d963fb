"""Captions find their images by key and by URL, in any order, and what is left over is counted."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.admin.takedown import TakedownConfig, take_down
from pipelines.cli.config import build
from pipelines.execution.connection import RayConfig
from pipelines.images.rows import IMAGE_ROW, PAIR_ROW, url_key
from pipelines.storage.sorting import ExternalSort
from pipelines.storage.tables import Table, parquet_files
from pipelines.training import pairs
from pipelines.training.caption_buckets import captions_of, sort_captions
from pipelines.training.config import Stage2Config
from pipelines.training.pairs import with_pairs
from tests.pipelines.earlier import as_of_earlier_version
from vlv_model.errors import DataError, RunError

write_pairs = partial(pairs.write_pairs, ray=RayConfig(address="in-process"))


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


@pytest.mark.parametrize(
    ("join_on", "on_ray"), [pytest.param("url", True, marks=pytest.mark.end_to_end), ("key", False)]
)
def test_captions_are_joined_and_counted(
    tmp_path: Path, join_on: Any, on_ray: bool, request: pytest.FixtureRequest
) -> None:
    if on_ray:
        request.getfixturevalue("ray_local")
    join = pairs.write_pairs if on_ray else write_pairs
    images = image_table(tmp_path / "images", 30, failed=(3, 4))
    texts = {i: f"caption {i}" for i in (*range(20), 77, 78, 79)}
    rows = [{"caption": text, "url": url(i), "key": url_key(url(i))} for i, text in texts.items()]
    rows += [{**rows[0], "caption": "a second one"}]
    rows += [{**rows[0], "url": url(i), "key": url_key(url(i)), "caption": None} for i in (21, 22)]
    rows += [{**rows[0], "url": url(23), "key": url_key(url(23)), "caption": " \n"}]
    counts = join(images, captions_file(tmp_path, rows), str(tmp_path / "pairs"), join_on=join_on)
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


def test_captions_are_read_from_text_files_and_joined_by_what_they_have(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 3)
    texts = {
        "by_url.csv": f'URL,caption\n{url(0)},"one, two"\n{url(1)},three\n',
        "by_key.csv": f'key,caption\n{url_key(url(0))},"one, two"\n{url_key(url(1))},three\n',
        "by_url.jsonl": f'{{"url": "{url(0)}", "caption": "one, two"}}\n'
        f'{{"url": "{url(1)}", "caption": "three"}}\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        output = str(tmp_path / f"{name}.pairs")
        assert write_pairs(images, str(tmp_path / name), output)["pairs"] == 2
        rows = pq.read_table(parquet_files(output))
        found = dict(zip(rows["url"].to_pylist(), rows["caption"].to_pylist(), strict=True))
        assert found == {url(0): "one, two", url(1): "three"}
    teacher = captions_file(tmp_path, [{"url": url(2), "caption": "c", "key": "00012"}])
    assert write_pairs(images, teacher, str(tmp_path / "parquet.pairs"))["pairs"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,caption\n1,c\n", "data.captions: .* neither a column `key` .* has id, caption"),
        ("key,caption\nabc,c\n", "column 'key' has other values .* data.join_on=url"),
        ("url,words\nhttp://h/1,c\n", "data.caption_column=caption.* no column 'caption'"),
    ],
)
def test_captions_that_cannot_be_joined_name_the_setting(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "captions.csv").write_text(text)
    images = image_table(tmp_path / "images", 1)
    with pytest.raises(DataError, match=message) as error:
        write_pairs(images, str(tmp_path / "captions.csv"), str(tmp_path / "pairs"))
    assert "\n" not in str(error.value)


def test_urls_are_joined_as_they_are_sent_and_keys_stay(tmp_path: Path) -> None:
    listed = ["http://h.org/a b.png", "http://bücher.example/%7ex.png"]
    rows = [{"url": url, "image": {"bytes": b"x", "path": None}} for url in listed]  # a user's own
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    spelled = ["http://h.org/a%20b.png", "http://xn--bcher-kva.example/~x.png"]
    teacher = captions_file(tmp_path, [{"url": u, "caption": u} for u in spelled])
    write_pairs(str(tmp_path / "mine.parquet"), teacher, str(tmp_path / "pairs"))
    assert pairs_of(tmp_path / "pairs") == dict(zip(listed, spelled, strict=True))


@pytest.mark.usefixtures("ray_local")
def test_chunks_without_pairs_are_committed(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 40)
    teacher = captions_file(tmp_path, [{"url": url(7), "caption": "seven"}])
    assert pairs.write_pairs(images, teacher, str(tmp_path / "pairs"))["pairs"] == 1
    table = Table(tmp_path / "pairs")
    assert table.pending() == []
    assert len(table.commits()) == 5


def test_an_unsorted_table_gives_the_same_pairs(tmp_path: Path) -> None:
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


def test_captions_are_found_in_many_buckets(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(400).tolist()
    file = captions_file(tmp_path, [{"url": url(i), "caption": f"c{i}"} for i in [*order, 7]])
    small = partial(ExternalSort, bucket_bytes=256, buffer_rows=50)
    plan = tmp_path / "plan"
    plan.mkdir()
    counts = sort_captions(plan, [Path(file)], "caption", "url", small)
    assert counts == {"captions": 400, "repeated_captions": 1, "blank_captions": 0}
    assert len(list(plan.glob("captions-*.plan"))) > 4
    for some in (range(405), [3], [402]):
        keys = pa.chunked_array([pa.array([url_key(url(i)) for i in some], pa.int64())])
        expected = [f"c{i}" if i < 400 else None for i in some]
        assert captions_of(keys, plan).to_pylist() == expected


def test_an_interrupted_join_continues_and_a_finished_one_is_kept(tmp_path: Path) -> None:
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
    assert "24 images, each with a caption" in (table.folder / "README.md").read_text()
    # One that an earlier version began goes on where its parts are.
    table = as_of_earlier_version(table)
    (table.folder / "_commits/000002.json").unlink()
    assert write_pairs(images, teacher, output) == counts
    assert pairs_of(tmp_path / "pairs") == whole
    assert len(list(table.folder.glob("part-*"))) == 3
    assert not (table.folder / "README.md").exists()


def test_row_groups_are_small_enough_for_a_reader_of_single_images(tmp_path: Path) -> None:
    pq.write_table(image_rows(list(range(40))), tmp_path / "mine.parquet")
    teacher = captions_file(tmp_path, [{"url": url(i), "caption": "c"} for i in range(40)])
    write_pairs(str(tmp_path / "mine.parquet"), teacher, str(tmp_path / "pairs"))
    (file,) = parquet_files(str(tmp_path / "pairs"))
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert groups == [16, 16, 8]


def test_captions_in_files_of_the_same_name_are_distinguished(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 3)
    for i in (0, 1):
        (tmp_path / f"teacher/{i}").mkdir(parents=True)
        captions_file(tmp_path / f"teacher/{i}", [{"url": url(i), "caption": f"c{i}"}])
    write_pairs(images, str(tmp_path / "teacher"), str(tmp_path / "pairs"))
    captions_file(tmp_path / "teacher/0", [{"url": url(0), "caption": "x0"}])  # of one size
    with pytest.raises(RunError, match=r"holds another run \(data\.captions"):
        write_pairs(images, str(tmp_path / "teacher"), str(tmp_path / "pairs"))


def test_pairs_are_kept_after_a_takedown_but_not_after_other_changes(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 12)
    teacher = captions_file(tmp_path, [{"url": url(i), "caption": f"c{i}"} for i in range(12)])
    output = str(tmp_path / "pairs")
    write_pairs(images, teacher, output)
    take_down(build(TakedownConfig, {"table": images, "urls": [url(3)]}))
    for _ in range(2):
        assert write_pairs(images, teacher, output)["pairs"] == 11
        assert pairs_of(tmp_path / "pairs") == {url(i): f"c{i}" for i in range(12) if i != 3}
    # Not by the takedown: neither captions nor images.
    captions_file(tmp_path, [{"url": url(0), "caption": "another"}])
    with pytest.raises(RunError, match=r"holds another run \(data\.captions"):
        write_pairs(images, teacher, output)
    captions_file(tmp_path, [{"url": url(i), "caption": f"c{i}"} for i in range(12)])
    part = Table(images).part(0)
    pq.write_table(pq.read_table(part).slice(1), part)
    with pytest.raises(RunError, match=r"holds another run \(data\.input"):
        write_pairs(images, teacher, output)


def test_an_unfinished_join_restarts_after_a_takedown(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 600, chunk=300)
    teacher = captions_file(tmp_path, [{"url": url(i), "caption": f"c{i}"} for i in range(600)])
    output = tmp_path / "pairs"
    write_pairs(images, teacher, str(output))
    (output / "_commits/000001.json").unlink()  # killed
    gone = {int(pq.read_table(Table(images).part(1))["key"][i].as_py()) for i in range(299)}
    take_down(build(TakedownConfig, {"table": images, "keys": sorted(gone)}))
    assert write_pairs(images, teacher, str(output))["pairs"] == 301
    assert {url_key(u) for u in pairs_of(output)} & gone == set()


def chunked(*values: Any, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


@pytest.mark.parametrize(
    ("join_on", "column", "values", "message"),
    [
        ("key", "key", chunked("abc"), "column 'key' is string, expected the int64 keys"),
        ("key", "key", chunked("7"), "column 'key' is string, expected the int64 keys"),
        ("key", "key", chunked(7.0), "column 'key' is double, expected the int64 keys"),
        ("key", "key", chunked(2**63, kind=pa.uint64()), "column 'key' is uint64 .* beyond int64"),
        ("url", "url", chunked(5), "column 'url' is int64, expected text"),
        ("url", "url", chunked(b"http://\xff/"), "column 'url' has values that are not UTF-8"),
        ("url", "caption", chunked(["a"]), "column 'caption' is list.*, expected text"),
        ("url", "caption", chunked({"a": "b"}), "column 'caption' is struct.*, expected text"),
        ("url", "caption", chunked(b"\xff"), "column 'caption' has values that are not UTF-8"),
    ],
)
def test_columns_of_another_type_give_a_one_line_error(
    tmp_path: Path, join_on: Any, column: str, values: pa.ChunkedArray, message: str
) -> None:
    images = image_table(tmp_path / "images", 3)
    rows = pa.table({"key": [url_key(url(0))], "url": [url(0)], "caption": ["x"]})
    rows = rows.set_column(rows.column_names.index(column), column, values)
    pq.write_table(rows, tmp_path / "teacher.parquet")
    with pytest.raises(DataError, match=rf"teacher\.parquet: {message}"):
        write_pairs(
            images, str(tmp_path / "teacher.parquet"), str(tmp_path / "pairs"), join_on=join_on
        )
    if column == "caption":
        return
    mine = image_rows([0])
    mine = mine.set_column(mine.schema.get_field_index(column), column, values)
    pq.write_table(mine, tmp_path / "mine.parquet")
    teacher = captions_file(tmp_path, rows_of(0), "sound.parquet")
    with pytest.raises(DataError, match=rf"mine\.parquet: {message}"):
        write_pairs(
            str(tmp_path / "mine.parquet"), teacher, str(tmp_path / "pairs"), join_on=join_on
        )


def rows_of(i: int) -> list[dict[str, Any]]:
    return [{"key": url_key(url(i)), "url": url(i), "caption": "x"}]


def test_utf8_bytes_are_joined(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 2)
    rows = [{"url": url(1).encode(), "caption": b"one"}]
    write_pairs(images, captions_file(tmp_path, rows), str(tmp_path / "pairs"))
    assert pairs_of(tmp_path / "pairs") == {url(1): "one"}


def test_damaged_tables_give_a_one_line_error(tmp_path: Path) -> None:
    images = image_table(tmp_path / "images", 3)
    teacher = Path(captions_file(tmp_path, rows_of(0)))
    sound = teacher.read_bytes()
    broken_pages(teacher)
    with pytest.raises(DataError, match=r"teacher\.parquet is not a readable Parquet file"):
        write_pairs(images, str(teacher), str(tmp_path / "pairs"))
    teacher.write_bytes(sound)
    pq.write_table(image_rows([0]).drop_columns(["status"]), tmp_path / "mine.parquet")
    broken_pages(tmp_path / "mine.parquet")
    with pytest.raises(DataError, match=r"mine\.parquet is not a readable Parquet file"):
        write_pairs(str(tmp_path / "mine.parquet"), str(teacher), str(tmp_path / "pairs"))


def broken_pages(file: Path) -> None:
    """Overwrite the columns of a Parquet file; the footer stays valid."""
    group = pq.read_metadata(file).row_group(0)
    end = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
    file.write_bytes(b"PAR1" + b"\xff" * end + file.read_bytes()[4 + end :])


def test_images_of_another_type_give_a_one_line_error(tmp_path: Path) -> None:
    mine = pa.table({"key": [url_key(url(0))], "url": [url(0)], "image": [b"bytes alone"]})
    pq.write_table(mine, tmp_path / "mine.parquet")
    teacher = captions_file(tmp_path, rows_of(0))
    with pytest.raises(DataError, match=r"mine\.parquet: column 'image' is binary"):
        write_pairs(str(tmp_path / "mine.parquet"), teacher, str(tmp_path / "pairs"))


def test_bad_input_gives_a_one_line_error(tmp_path: Path) -> None:
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
    config = build(
        Stage2Config,
        {"run_dir": str(tmp_path / "run"), "data": data, "ray": {"address": "in-process"}},
    )
    joined = with_pairs(config)
    assert joined.data.input == str(tmp_path / "run/pairs")
    assert (joined.data.captions, joined.data.caption_column) == (None, "caption")
    assert pairs_of(tmp_path / "run/pairs") == {url(1): "one"}
    assert with_pairs(joined) == joined  # captions are in the table already
