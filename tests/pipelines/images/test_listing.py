"""Foreign images: each is one row with its own key; an unreadable one has a status that says so."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.cli.config import build
from pipelines.execution.read_images import ReadImages
from pipelines.execution.steps import Chunk
from pipelines.images import external
from pipelines.images.listing import list_images
from pipelines.images.rows import key_of, url_key
from pipelines.images.selection import Selection
from pipelines.storage.files import as_path
from tests.pipelines.foreign import colour_of, png, read, shard, write_folder
from tests.pipelines.image_jobs import open_table
from vlv_model.errors import ConfigError, DataError, RunError
from vlv_model.squares import Square

COLOURS = ["red", "green", "blue", "white"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images")


def test_folder_gives_a_row_per_image_file(folder: Path, tmp_path: Path) -> None:
    rows = read(folder, tmp_path / "out")
    assert [(row["name"], row["status"]) for row in rows] == [
        ("_DSC1.JPG", "ok"),
        ("a/photo.png", "ok"),
        ("b/photo.png", "ok"),
        ("broken.jpg", "decode:not_an_image"),
        ("empty.webp", "decode:no_image"),
    ]
    assert [row["key"] for row in rows] == [key_of(row["name"]) for row in rows]
    assert colour_of(rows[1]) == (255, 0, 0)
    assert colour_of(rows[2]) == (0, 0, 255)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    again = read(moved, tmp_path / "again")
    assert [row["key"] for row in again] == [row["key"] for row in rows]


def test_file_deleted_meanwhile_is_a_failed_row(folder: Path, tmp_path: Path) -> None:
    selection = build(Selection, {"input": str(folder), "output": str(tmp_path / "out")})
    table = open_table("caption", selection, {})
    (folder / "a/photo.png").unlink()
    os.mkfifo(folder / "a/photo.png")  # reading it would block
    rows = ReadImages(table, Square(8))(Chunk(0)).rows.to_pylist()
    states = {row["name"]: row["status"] for row in rows}
    assert states["a/photo.png"] == "decode:unreadable"
    assert states["b/photo.png"] == "ok"
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="cannot be read"):  # instead of a table of failed rows
        ReadImages(table, Square(8))(Chunk(0))


def test_listing_is_made_once(folder: Path, tmp_path: Path) -> None:
    first = read(folder, tmp_path / "out")
    (folder / "new.png").write_bytes(png("red"))
    assert read(folder, tmp_path / "out") == first
    assert len(read(folder, tmp_path / "other")) == 6


# --------------------------------------------------------------------------------------- Parquet


def test_parquet_written_by_datasets(tmp_path: Path) -> None:
    import datasets

    pictures = [{"bytes": png(colour), "path": f"{colour}.png"} for colour in COLOURS]
    made = datasets.Dataset.from_dict({"picture": pictures, "label": [0, 1, 2, 3]})
    made = made.cast_column("picture", datasets.Image())
    (tmp_path / "in").mkdir()
    made.to_parquet(str(tmp_path / "in/train-00000-of-00001.parquet"))
    rows = read(tmp_path / "in", tmp_path / "out")
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["name"] for row in rows] == sorted(f"{colour}.png" for colour in COLOURS)
    assert len({row["key"] for row in rows}) == 4


def img2dataset(path: Path) -> Path:
    """Parquet as img2dataset writes it: bytes in `jpg`, null for failures."""
    images = [png(colour) for colour in COLOURS]
    columns = {
        "url": [f"HTTP://h.org/{colour}" for colour in COLOURS] + ["http://h.org/dead"],
        "key": [f"00000000{i}" for i in range(5)],
        "status": ["success"] * 4 + ["failed_to_download"],
        "jpg": pa.array([*images, None], pa.binary()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_parquet_written_by_img2dataset(tmp_path: Path) -> None:
    file = img2dataset(tmp_path / "00000.parquet")
    rows = read(file, tmp_path / "out")
    assert [row["status"] for row in rows] == [*["ok"] * 4, "decode:no_image"]
    assert {row["key"] for row in rows} == {key_of(f"00000.parquet#{i}") for i in range(5)}
    rows = read(file, tmp_path / "urls", key_column="url")
    assert {url_key(f"http://h.org/{colour}") for colour in COLOURS} < {r["key"] for r in rows}
    rows = read(file, tmp_path / "some", where="status = 'success' and url like '%e%'")
    assert [row["name"] for row in rows] == [f"HTTP://h.org/{c}" for c in sorted(COLOURS)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_every_type_of_bytes_is_read(kind: pa.DataType, tmp_path: Path) -> None:
    fields = [("bytes", kind), ("path", pa.string())]
    values = [{"bytes": png("red"), "path": "a"}, None, {"bytes": b"", "path": "b"}]
    structs = pa.array(values, pa.struct(fields))
    pq.write_table(pa.table({"picture": structs}), tmp_path / "struct.parquet")
    rows = read(tmp_path / "struct.parquet", tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "decode:no_image", "decode:no_image"]
    bare = pa.array([png("red"), None], kind)
    pq.write_table(pa.table({"picture": bare}), tmp_path / "bare.parquet")
    rows = read(tmp_path / "bare.parquet", tmp_path / "more")
    assert [row["status"] for row in rows] == ["ok", "decode:no_image"]


def test_image_column_without_bytes_is_refused(tmp_path: Path) -> None:
    """Also beside a key, as in a table of this pipeline."""
    struct = {"bytes": png("red"), "path": "a"}
    for number, values in enumerate((["a.png"], [[struct]])):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"key": [1], "image": values}), file)
        with pytest.raises(DataError, match=r"no image column .* key \(int64\), image \("):
            read(file, tmp_path / "out")


def test_hidden_parquet_files_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "in/_plan").mkdir(parents=True)
    pq.write_table(pa.table({"image": [png("red")]}), tmp_path / "in/a.parquet")
    for name in ("_metadata.parquet", "_plan/rows-0000.parquet"):
        pq.write_table(pa.table({"key": [1]}), tmp_path / "in" / name)
    (row,) = read(tmp_path / "in", tmp_path / "out")
    assert row["name"] == "a.parquet#0"
    (again,) = read(f"{tmp_path}/in/**/*.parquet", tmp_path / "glob")
    assert again == row


def test_large_row_group_is_read_in_batches(tmp_path: Path) -> None:
    colours = [COLOURS[i % 4] for i in range(100)]
    images = pa.array([png(colour) for colour in colours], pa.large_binary())
    pq.write_table(pa.table({"content": images}), tmp_path / "in.parquet")
    expected = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}
    given = {"input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out")}
    for row in read(given["input"], given["output"], rows_per_chunk=7):
        colour = colours[int(row["name"].partition("#")[2])]
        assert colour_of(row) == expected.get(colour, (255, 255, 255))
    (listing,), about = build(Selection, given).images()
    earlier = listing.rename(listing.with_suffix(".parquet"))  # the suffix of earlier versions
    assert build(Selection, given).images() == ([earlier], about)
    rows = pq.read_table(earlier).sort_by("row").to_pylist()
    assert len(rows) == 100
    images = external.ExternalImages("content", whole=100)
    for row in (*rows, *rows[20:30:3], rows[0]):  # forwards, then back, with gaps
        assert images.read(row) == png(colours[row["row"]])


def test_an_empty_row_group_has_no_images(tmp_path: Path) -> None:
    """As pandas writes an empty frame, beside parts with rows."""
    folder = tmp_path / "parts"
    folder.mkdir()
    rows = pa.table({"key": [7], "image": [png("red")], "status": ["ok"]})
    pq.write_table(rows, folder / "0.parquet")
    pq.write_table(rows.slice(0, 0), folder / "1.parquet")
    assert pq.read_metadata(folder / "1.parquet").num_row_groups == 1
    files, _ = list_images(tmp_path / "out", str(folder))
    assert [key for file in files for key in pq.read_table(file)["key"].to_pylist()] == [7]


def test_an_interrupted_listing_answers_no_request(tmp_path: Path) -> None:
    """Not even an earlier one, whose listing it has replaced."""
    rows = pa.table({"key": [1, 2], "image": [png("red"), png("blue")], "size": [1, 9]})
    pq.write_table(rows, tmp_path / "rows.parquet")

    def keys(where: str) -> list[int]:
        files, _ = list_images(tmp_path / "out", str(tmp_path / "rows.parquet"), where=where)
        return sorted(key for file in files for key in pq.read_table(file)["key"].to_pylist())

    assert keys("size > 5") == [2]
    with pytest.raises(DataError, match="no row for which size > 50"):
        keys("size > 50")
    assert keys("size > 5") == [2]


def test_image_column_is_chosen_by_a_setting(tmp_path: Path) -> None:
    file = tmp_path / "in.parquet"
    struct = pa.array([{"bytes": png("red"), "path": None}])
    blob = pa.array([png("blue")], pa.binary())
    pq.write_table(pa.table({"left": struct, "right": blob, "label": [1]}), file)
    with pytest.raises(DataError, match=r"several columns .*\(left, right\)"):
        read(file, tmp_path / "out")
    (row,) = read(file, tmp_path / "out", image_column="right")
    assert colour_of(row) == (0, 0, 255)
    with pytest.raises(DataError, match=r"label \(int64\)"):
        read(file, tmp_path / "other", image_column="label")
    pq.write_table(pa.table({"label": [1], "words": ["a"]}), file)
    with pytest.raises(DataError, match=r"no image column .* label \(int64\), words \(string\)"):
        read(file, tmp_path / "third")


def test_foreign_table_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for path in ("secret.png", "in/own.png"):
        (tmp_path / path).write_bytes(png("red"))
    names = ["own.png", "../secret.png", str(tmp_path / "secret.png"), "s3://bucket/secret.png"]
    image = pa.array([{"bytes": None, "path": name} for name in names], external.IMAGE_STRUCT)
    pq.write_table(pa.table({"image": image}), tmp_path / "in/t.parquet")
    states = {row["name"]: row["status"] for row in read(tmp_path / "in", tmp_path / "out")}
    assert states == dict.fromkeys(names, "decode:outside") | {"own.png": "ok"}
    # The same for a table of our layout, recognised by its key.
    pq.write_table(
        pa.table({"key": range(4), "name": names, "image": image}), tmp_path / "in/t.parquet"
    )
    keyed = {row["name"]: row["status"] for row in read(tmp_path / "in", tmp_path / "keyed")}
    assert keyed == states


def test_unsigned_keys_keep_their_bits(tmp_path: Path) -> None:
    keys = [2**63 + 5, 2**64 - 1, 0, 7]
    rows = {"key": pa.array(keys, pa.uint64()), "image": [png(colour) for colour in COLOURS]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    found = {row["key"]: colour_of(row) for row in read(tmp_path / "t.parquet", tmp_path / "out")}
    assert sorted(found) == [-(2**63) + 5, -1, 0, 7]
    assert found[-1] == (0, 128, 0)


@pytest.mark.parametrize("where", [None, "key > 0"])
def test_status_of_another_type_is_a_one_line_error(tmp_path: Path, where: str | None) -> None:
    rows = {"key": [1, 2], "image": [png("red")] * 2, "status": [200, 404]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: column 'status' is int64, expected text"):
        read(tmp_path / "t.parquet", tmp_path / "out", where=where)


def test_repeated_key_is_refused(tmp_path: Path) -> None:
    images = pa.array([png("red"), png("blue")], pa.binary())
    pq.write_table(pa.table({"image": images, "id": ["a", "a"]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="occurs more than once"):
        read(tmp_path / "in.parquet", tmp_path / "out", key_column="id")


# ------------------------------------------------------------------------------------------- tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    for number in range(2):
        names = {}
        for i, colour in enumerate(COLOURS):
            names[f"{i:09d}.png"] = png(colour)
            names[f"{i:09d}.txt"] = b"a caption"
            names[f"{i:09d}.json"] = b"{}"
        shard(root / f"{number:05d}.tar", names)
        pq.write_table(pa.table({"url": ["a"]}), root / f"{number:05d}.parquet")
    return root


def test_shards_give_a_row_per_image(shards: Path, tmp_path: Path) -> None:
    rows = read(shards, tmp_path / "out")
    assert [row["name"] for row in rows] == [
        f"0000{number}.tar/{i:09d}.png" for number in range(2) for i in range(4)
    ]
    assert [row["key"] for row in rows] == [key_of(row["name"]) for row in rows]
    assert [colour_of(row) for row in rows[:2]] == [(255, 0, 0), (0, 128, 0)]
    some = read(shards, tmp_path / "some", where="name like '00001.tar/%' and size > 0")
    assert some == rows[4:]


def test_damaged_shard_gives_its_intact_images_and_a_failed_row(
    shards: Path, tmp_path: Path
) -> None:
    whole = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(whole[:3000])  # in the header of the third file
    (shards / "00001.tar").write_bytes(b"not an archive")
    rows = read(shards, tmp_path / "out")
    states = [row["status"] for row in rows]
    assert sorted(states) == ["decode:shard", "decode:shard", "ok"]
    assert "damaged from byte" in next(r["error"] for r in rows if r["status"] != "ok")


def test_members_with_an_unknown_suffix_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {"0.png": png("red"), "0.json": b"{}", "0.txt": b"a", "1.raw": b"1", "2.RAW": b"2"}
    shard(tmp_path / "0.tar", {**members, "._0.raw": b"", "3": b"3", "d/0.cls": b"7"})
    (row,) = read(tmp_path / "0.tar", tmp_path / "out")
    assert row["name"] == "0.tar/0.png"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "3 files in its shards were skipped, because their names are not those of images: "
        "2 .raw, 1 without suffix"
    )
    shard(tmp_path / "1.tar", {"1.raw": b"1"})
    with pytest.raises(DataError, match=r"has no image \(and 1 \.raw\)"):
        read(tmp_path / "1.tar", tmp_path / "none")


def test_compressed_shard_is_refused(shards: Path, tmp_path: Path) -> None:
    packed = gzip.compress((shards / "00000.tar").read_bytes())
    (shards / "00000.tar").write_bytes(packed)
    with pytest.raises(DataError, match=r"00000.tar is compressed \(gzip\): decompress it"):
        read(shards, tmp_path / "out")


def test_changed_shards_are_another_run(shards: Path, tmp_path: Path) -> None:
    read(shards, tmp_path / "out")
    shard(shards / "00001.tar", {"a.png": png("red")})
    with pytest.raises(RunError, match=r"data\.input \(files\): "):
        read(shards, tmp_path / "out")


# ------------------------------------------------------------------------------- stores, conditions


@pytest.fixture
def remote(bucket: str, folder: Path, shards: Path) -> str:
    img2dataset(folder.parent / "00000.parquet")
    (as_path(bucket) / "parquet/00000.parquet").write_bytes(
        (folder.parent / "00000.parquet").read_bytes()
    )
    for root in (folder, shards):
        for file in root.rglob("*"):
            if file.is_file():
                below = file.relative_to(root.parent).as_posix()
                (as_path(bucket) / below).write_bytes(file.read_bytes())
    return bucket


def test_object_stores_give_the_same_rows(
    remote: str, folder: Path, shards: Path, tmp_path: Path
) -> None:
    for name in ("images", "shards"):
        here = read(tmp_path / name, tmp_path / f"here-{name}")
        there = read(f"{remote}/{name}", f"{remote}/out-{name}")
        assert [{k: v for k, v in row.items() if k != "error"} for row in there] == [
            {k: v for k, v in row.items() if k != "error"} for row in here
        ]
    rows = read(f"{remote}/parquet", f"{remote}/out-parquet")
    assert [row["status"] for row in rows] == [*["ok"] * 4, "decode:no_image"]


def test_condition_selects_rows_of_a_table(pair_table: Path, tmp_path: Path) -> None:
    everything = read(pair_table, tmp_path / "all")
    some = read(pair_table, tmp_path / "some", where="caption like '%red%' and aesthetic is null")
    assert 0 < len(some) < len(everything)
    pixels = {row["key"]: row["pixels"] for row in everything}
    assert all(row["pixels"] == pixels[row["key"]] for row in some)
    with pytest.raises(DataError, match="no row for which"):
        read(pair_table, tmp_path / "none", where="caption = 'never'")
    with pytest.raises(ConfigError, match=r"data.where=.*colour.*columns: .*caption"):
        read(pair_table, tmp_path / "wrong", where="colour = 'red'")
    with pytest.raises(ConfigError, match="not a valid condition"):
        read(pair_table, tmp_path / "files", where="key in (select 1 from read_csv('/etc/passwd'))")
