"""Detecting the kind of input: no image is ignored silently."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.images import external
from pipelines.images.rows import key_of
from tests.pipelines.foreign import colour_of, png, read, shard, write_folder
from vlv_model.errors import DataError, RunError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images")


def test_error_without_images_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt", "c.json"):
        (tmp_path / "in" / name).touch()
    with pytest.raises(DataError, match=r"no Parquet files, .tar shards or images; .*2 .txt, 1 .j"):
        read(tmp_path / "in", tmp_path / "out")


def test_image_formats_are_found_by_suffix(tmp_path: Path) -> None:
    for suffix in ("pgm", "ico", "J2K"):
        kind = {"pgm": "PPM", "J2K": "JPEG2000"}.get(suffix, suffix.upper())
        Image.new("L", (24, 24), 9).save(tmp_path / f"a.{suffix}", kind)
    assert [row["status"] for row in read(tmp_path, tmp_path / "out")] == ["ok"] * 3


def test_links_to_folders(folder: Path, tmp_path: Path) -> None:
    whole = read(folder, tmp_path / "out")
    (folder / "again").symlink_to("a")
    (folder / "a/up").symlink_to("..")
    assert read(folder, tmp_path / "links") == whole
    (tmp_path / "others").mkdir()
    (folder / "more").symlink_to(tmp_path / "others")
    with pytest.raises(DataError, match=r"more is a link to .*/others, and links .* not followed"):
        read(folder, tmp_path / "outside")


def test_unreadable_folder_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match="images/b cannot be read: Permission denied"):
        read(folder, tmp_path / "out")


def test_glob_pattern(folder: Path, tmp_path: Path) -> None:
    rows = read(f"{folder}/*/*.png", tmp_path / "out")
    assert [(row["name"], row["status"]) for row in rows] == [
        ("a/photo.png", "ok"), ("b/photo.png", "ok")
    ]  # fmt: skip
    assert [row["key"] for row in rows] == [key_of(row["name"]) for row in rows]
    assert read(f"{folder}/*/*.png", tmp_path / "out") == rows
    with pytest.raises(DataError, match="does not exist"):
        read(f"{folder}/*.bmp", tmp_path / "none")


def test_tables_inside_the_input_are_ignored(folder: Path, tmp_path: Path) -> None:
    """A job may write into its input folder, and its table may contain images too."""
    first = read(folder, tmp_path / "out")
    images = pa.array([{"bytes": png("red"), "path": "a"}], external.IMAGE_STRUCT)
    for number in range(2):
        inside = folder / f"captions{number}"
        (inside / "data").mkdir(parents=True)
        (inside / "_table.json").write_text("{}")
        pq.write_table(pa.table({"key": [1], "image": images}), inside / "data/part-0.parquet")
    assert read(folder, tmp_path / "again") == first
    for inside in ("a", "b"):
        shutil.rmtree(folder / inside)
    for file in folder.glob("*.*"):
        file.unlink()
    with pytest.raises(DataError, match=r"contains tables \(captions0, …\): give the path"):
        read(folder, tmp_path / "tables")


def test_mixture_of_kinds_is_an_error(folder: Path, tmp_path: Path) -> None:
    shard(folder / "0.tar", {"a.png": png("red")})
    with pytest.raises(DataError, match=r"\.tar shards and other images .*\*\*/\*\.tar'"):
        read(folder, tmp_path / "out")
    assert len(read(f"{folder}/**/*.tar", tmp_path / "tars")) == 1
    assert len(read(f"{folder}/**/*.[pj]*g", tmp_path / "files")) == 3
    (tmp_path / "compressed").mkdir()
    shutil.move(folder / "0.tar", tmp_path / "compressed")
    (tmp_path / "compressed/1.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"1\.tar\.gz"):
        read(tmp_path / "compressed", tmp_path / "gz")


def test_images_in_folders_with_an_empty_name_are_separate(bucket: str, tmp_path: Path) -> None:
    """Object stores allow folders with an empty name (`a//b.png`)."""
    import s3fs

    store = s3fs.S3FileSystem()
    colours = {"a.png": "red", "/a.png": "green", "d//a.png": "blue", "//e/a.png": "white"}
    for name, colour in colours.items():
        store.pipe_file(f"{bucket}/images/{name}", png(colour))
    for hidden in ("/.b.png", "/_logs/b.png"):
        store.pipe_file(f"{bucket}/images/{hidden}", png("red"))
    rows = {row["name"]: row for row in read(f"{bucket}/images", tmp_path / "out")}
    assert set(rows) == set(colours)
    assert [colour_of(rows[name]) for name in ("a.png", "/a.png")] == [(255, 0, 0), (0, 128, 0)]
    assert len({row["key"] for row in rows.values()}) == 4
    by_glob = read(f"{bucket}/images/**/*.png", tmp_path / "glob")
    assert {row["name"] for row in by_glob} == set(colours)
    (one,) = read(f"{bucket}/images//*.png", tmp_path / "one")
    assert colour_of(one) == (0, 128, 0)


def test_shards_in_folders_with_an_empty_name_are_found(bucket: str, tmp_path: Path) -> None:
    import s3fs

    shard(tmp_path / "0.tar", {"0.png": png("red")})
    for name in ("0.tar", "/0.tar", "d//0.tar"):
        s3fs.S3FileSystem().put_file(str(tmp_path / "0.tar"), f"{bucket}/tars/{name}")
    for given, out in ((f"{bucket}/tars", "all"), (f"{bucket}/tars/**/*.tar", "glob")):
        names = {row["name"] for row in read(given, tmp_path / out)}
        assert names == {"0.tar/0.png", "/0.tar/0.png", "d//0.tar/0.png"}


@pytest.mark.parametrize("encoding", ["chw", "hwc", "npy"])
def test_raw_arrays_wherever_they_lie(tmp_path: Path, encoding: str) -> None:
    """In Parquet (bytes or a struct), in shards and in folders; other members are not taken."""
    picture = np.zeros((8, 8, 3), np.uint8) + np.array([200, 30, 7], np.uint8)
    array = picture if encoding == "hwc" else np.ascontiguousarray(picture.transpose(2, 0, 1))
    content = array.tobytes()
    if encoding == "npy":
        file = io.BytesIO()
        np.save(file, array)
        content = file.getvalue()
    name = f"a.{'npy' if encoding == 'npy' else 'bin'}"
    (tmp_path / "folder").mkdir()
    for file_name, inside in ((name, content), (f"b{name}", content[:-1]), ("c.png", png("red"))):
        (tmp_path / "folder" / file_name).write_bytes(inside)
    shard(tmp_path / "s.tar", {name: content, f"b{name}": content[:-1], "c.png": png("red")})
    columns: dict[str, list[Any]] = {
        "image": [content, content[:-1]],
        "struct": [{"bytes": content, "path": None}, {"bytes": content[:-1], "path": None}],
    }
    for column, values in columns.items():
        pq.write_table(pa.table({"image": values}), tmp_path / f"{column}.parquet")
    # Rows of our own layout are not listed.
    pq.write_table(pa.table({"key": [1, 2], "image": columns["image"]}), tmp_path / "own.parquet")
    for where in ("folder", "s.tar", "image.parquet", "struct.parquet", "own.parquet"):
        rows = read(tmp_path / where, tmp_path / f"out-{where}", image_encoding=encoding)
        assert [colour_of(row) for row in rows if row["pixels"]] == [(200, 30, 7)], where
        (bad,) = (row for row in rows if not row["pixels"])
        assert bad["status"] in ("decode:not_an_image", "decode:corrupt"), where
    with pytest.raises(RunError, match=r"data.image_encoding: "):
        read(tmp_path / "image.parquet", tmp_path / "out-image.parquet")
