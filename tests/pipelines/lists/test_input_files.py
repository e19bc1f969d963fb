"""The files of a list of URLs: none is missed, and files of other tools are not read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.lists.input_files import input_files
from pipelines.storage.fingerprints import content_fingerprint
from vlv_model.errors import DataError


def test_input_is_a_file_a_folder_or_a_glob(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.csv", "deep/c.jsonl.gz", "notes.txt", "._hidden.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = lambda files: [file.name for file in files]  # noqa: E731
    assert names(input_files(str(tmp_path))) == ["a.csv", "b.parquet", "c.jsonl.gz"]
    assert names(input_files(str(tmp_path / "*.parquet"))) == ["b.parquet"]
    assert names(input_files(str(tmp_path / "notes.txt"))) == ["notes.txt"]
    with pytest.raises(DataError, match="does not exist"):
        input_files(str(tmp_path / "none.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no metadata"):
        input_files(str(tmp_path / "empty"))


def test_json_beside_other_lists_is_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Like img2dataset's 00000_stats.json beside 00000.parquet."""
    for name in ("00000.parquet", "00000_stats.json", "deep/dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in input_files(str(tmp_path))] == ["00000.parquet"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: 2 .json files beside lists of other formats are taken for notes"
    )
    assert str(tmp_path / "00000_stats.json") in line
    found = input_files(str(tmp_path / "*.json"))
    assert [file.name for file in found] == ["00000_stats.json"]
    assert [file.name for file in input_files(str(tmp_path / "deep"))] == ["dataset_infos.json"]
    assert not capsys.readouterr().err


def test_lists_in_folders_with_an_empty_name_are_found(bucket: str) -> None:
    import s3fs

    names = ["a.csv", "/b.csv", "x//c.csv"]
    for name in names:
        s3fs.S3FileSystem().pipe_file(f"{bucket}/lists/{name}", b"url\nhttp://a/\n")
    for pattern in ("", "/**/*.csv"):
        found = [str(file) for file in input_files(f"{bucket}/lists{pattern}")]
        assert sorted(found) == sorted(f"{bucket}/lists/{name}" for name in names)
    assert len(content_fingerprint(input_files(f"{bucket}/lists"))) == 3


def test_files_of_equal_name_have_different_fingerprints(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / "list" / folder).mkdir(parents=True)
        (tmp_path / "list" / folder / "l.csv").write_text(f"url\nhttp://{folder}/\n")
    before = content_fingerprint(input_files(str(tmp_path / "list")))
    assert list(before) == ["a/l.csv", "b/l.csv"]
    (tmp_path / "list").rename(tmp_path / "moved")
    assert content_fingerprint(input_files(str(tmp_path / "moved"))) == before
    (tmp_path / "moved/a/l.csv").write_text("url\nhttp://c/\n")
    assert content_fingerprint(input_files(str(tmp_path / "moved"))) != before
    with pytest.raises(DataError, match=r"gone\.csv cannot be read: No such file"):
        content_fingerprint([tmp_path / "gone.csv"])


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "y" * 5000])
def test_invalid_file_name_is_a_one_line_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not exist") as raised:
        input_files(str(tmp_path / name))
    assert len(str(raised.value)) < 400


def test_leftovers_of_other_tools_are_not_read(folder: Path) -> None:
    """Markers, temporary files, transaction logs, macOS's companion files."""
    leftovers = ["_SUCCESS", ".a.csv", "_temporary/0/a.csv", "_delta_log/1.parquet", ".git/a.csv"]
    for name in [*leftovers, "deep/_old/a.csv", "deep/er/b.CSV.GZ", "a_b.csv"]:
        write(folder / name)
    assert [file.name for file in input_files(str(folder))] == ["a_b.csv", "b.CSV.GZ"]


@pytest.mark.parametrize(
    "name",
    ["a b.csv", "p%20q.csv", "h#1.csv", "q?x.csv", "g[1].csv", "st*r.csv", "ü.csv", "a&;+.csv"],
)
def test_special_characters_in_names(folder: Path, name: str) -> None:
    write(folder / name)
    for path in (folder, folder / name):
        (file,) = input_files(str(path))
        assert file.name == name
        assert file.read_text() == "url\n"
        assert list(content_fingerprint([file])) == [name]


@pytest.mark.parametrize(
    "pattern", ["*/a.csv", "l?st/*.csv", "[kl]ist/a.csv", "**/a.csv", "li*/?.csv"]
)
def test_glob_patterns(folder: Path, pattern: str) -> None:
    write(folder / "list/a.csv")
    write(folder / "other.csv")
    assert [file.name for file in input_files(f"{folder}/{pattern}")] == ["a.csv"]


def test_moved_list_keeps_its_fingerprint(folder: Path) -> None:
    for name in ("one/list/a.csv", "two/b/list/a.csv"):
        write(folder / name)
    prints = [
        content_fingerprint(input_files(str(folder / name))) for name in ("one/list", "two/b/list")
    ]
    assert prints[0] == prints[1]
    assert list(prints[0]) == ["a.csv"]


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/b.csv")
    write(tmp_path / "list/a.csv")
    (tmp_path / "list/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "list/again").symlink_to(tmp_path / "list")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "list")
    assert [file.name for file in input_files(str(tmp_path / "list"))] == ["a.csv", "b.csv"]


@pytest.mark.parametrize("path", ["list", "list/*.csv"])
def test_broken_link_is_an_error(tmp_path: Path, path: str) -> None:
    write(tmp_path / "list/a.csv")
    (tmp_path / "list/b.csv").symlink_to(tmp_path / "unmounted/b.csv")
    with pytest.raises(DataError, match=r"b\.csv is not a file: it may be a broken link"):
        input_files(str(tmp_path / path))


@pytest.mark.parametrize("name", ["b.csv.bz2", "b.JSONL.zst", "b.parquet.zip"])
def test_unsupported_compression_is_an_error(folder: Path, name: str) -> None:
    for other in ("a.csv", "photos.zip", "notes.txt"):
        write(folder / other)
    assert [file.name for file in input_files(str(folder))] == ["a.csv"]
    write(folder / name)
    with pytest.raises(DataError, match="uncompressed or gzip-compressed: decompress it"):
        input_files(str(folder))


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"bad\xff.csv")
    write(tmp_path / name)
    assert list(content_fingerprint(input_files(str(tmp_path)))) == [name]


def write(file: Path) -> None:
    """Write a small list; on a disk, create its folder first."""
    if "://" not in str(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("url\n")
