"""Tar shards: every image is one row, whatever its name, and damage is reported."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.images.external import BROKEN_LINK, DAMAGED
from pipelines.images.shards import list_shard

LINKS = [("hard.png", tarfile.LNKTYPE, "./d/a.png"), ("d/soft.png", tarfile.SYMTYPE, "../b.png"),
         ("gone.png", tarfile.SYMTYPE, "/etc/c.png")]  # fmt: skip


def shard(path: Path, names: list[str], links: Any = (), kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 10
            tar.addfile(info, io.BytesIO(b"%010d" % number))
        for name, type_, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, target
            tar.addfile(info)
    return path


def content(row: dict[str, Any]) -> bytes:
    with open(row["image"]["path"], "rb") as stream:
        stream.seek(row["offset"])
        return stream.read(row["size"])


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_unusual_names(kind: int, tmp_path: Path) -> None:
    names = ["./a.png", "./a.png", "/etc/b.png", "../c.PNG", "d/" + "e" * 300 + ".jpg", "ü\n%#.png",
             "not\udcff.png", "0.left.png", "0.right.png"]  # fmt: skip
    others = ["0.json", "._a.png", "d/.hidden.png", ".png"]
    rows = list_shard(shard(tmp_path / "0.tar", names + others, kind=kind), "0.tar")
    assert [content(row) for row in rows] == [b"%010d" % n for n in range(len(names))]
    assert len({row["key"] for row in rows}) == len({row["name"] for row in rows}) == len(names)
    assert rows[0]["name"] == "0.tar/./a.png"
    assert rows[1]["name"].startswith("0.tar/./a.png@")
    assert rows[6]["name"] == "0.tar/not\\udcff.png"


def test_links_give_the_images_of_their_targets(tmp_path: Path) -> None:
    rows = list_shard(shard(tmp_path / "0.tar", ["d/a.png", "b.png"], LINKS), "0.tar")
    assert [row["name"] for row in rows[2:]] == [f"0.tar/{name}" for name, _, _ in LINKS]
    assert [content(row) for row in rows[2:4]] == [content(row) for row in rows[:2]]
    assert rows[4]["size"] == BROKEN_LINK


def test_truncated_shards_and_trailing_data_are_reported(tmp_path: Path) -> None:
    whole = shard(tmp_path / "0.tar", ["a.png", "b.png"]).read_bytes()
    for damaged in (whole[:1024], whole[:2048], whole[:2000], whole + whole, whole[:1020]):
        (tmp_path / "1.tar").write_bytes(damaged)
        *intact, last = list_shard(tmp_path / "1.tar", "1.tar")
        assert last["size"] == DAMAGED
        assert all(content(row) for row in intact if row["size"] > 0)
    (tmp_path / "1.tar").write_bytes(whole + bytes(1 << 20))
    assert len(list_shard(tmp_path / "1.tar", "1.tar")) == 2
    assert list_shard(shard(tmp_path / "none.tar", []), "none.tar") == []


@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"\xff" * 8 + b"\xff\xff\xfe\x00", b"\x80" + b"\x7f" * 11]
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_impossible_size_ends_the_shard(size: bytes, kind: bytes, tmp_path: Path) -> None:
    file = shard(tmp_path / "0.tar", ["a.png", "b.png"])
    forged = bytearray(file.read_bytes())
    header = forged[1024:1536]
    header[124:136], header[156:157] = size, kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    forged[1024:1536] = header
    file.write_bytes(forged)
    rows = list_shard(file, "0.tar")
    assert content(rows[0]) == b"%010d" % 0
    assert rows[-1]["size"] == DAMAGED
