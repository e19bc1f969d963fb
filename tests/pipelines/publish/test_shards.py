"""Captions and images leave as WebDataset shards: each once, in spite of a kill, readable by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.images.listing import list_images
from pipelines.images.random_access import RowIndex, RowReader
from pipelines.images.rows import CAPTION_ROW, IMAGE_ROW
from pipelines.publish import shards
from pipelines.publish.shards import write_shards
from pipelines.storage.tables import Table
from vlv_model.errors import DataError, RunError

KEYS = [-5, 3, 2**62, 7, 11, 12, 13]
TEXTS = dict(zip(KEYS, ["one\ntwo", "قطة 🎉", "c", "d", "e", None, "no image"], strict=True))
JPEG, PNG = b"\xff\xd8\xff" + bytes(700), b"\x89PNG\r\n\x1a\n" + bytes(20)


@pytest.fixture
def tables(tmp_path: Path) -> tuple[str, str]:
    """Five images with captions, one without a caption, and a caption without an image."""
    captions, images = Table(tmp_path / "captions"), Table(tmp_path / "images")
    captions.create("caption", {}, 2)
    rows = [
        {"key": key, "name": f"n{key}", "caption": text, "num_words": 3, "model": "m",
         "status": "ok" if text else "caption:empty"}
        for key, text in TEXTS.items()
    ]  # fmt: skip
    for part in range(2):
        captions.write(
            part, pa.Table.from_pylist(rows[part * 4 : part * 4 + 4], schema=CAPTION_ROW)
        )
    (captions.folder / "_published.json").write_text("{}")
    images.create("image", {}, 1)
    files = [{"key": key, "image": {"bytes": JPEG + bytes([key % 250]) if key != 7 else PNG},
              "url": f"http://h.org/{key}", "status": "ok"} for key in KEYS[:-1]]  # fmt: skip
    images.write(0, pa.Table.from_pylist(files, schema=IMAGE_ROW))
    return str(captions.folder), str(images.folder)


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """As the library webdataset reads them."""
    import webdataset as wds

    urls = sorted(str(file) for file in folder.glob("*.tar"))
    return list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))


def test_samples_have_image_caption_and_row(tables: tuple[str, str], tmp_path: Path) -> None:
    captions, images = tables
    counts = write_shards(captions, str(tmp_path / "out"), images, rows_per_shard=2)
    assert counts == {"images": 5, "without_image": 1}
    samples = samples_of(tmp_path / "out")
    assert len(samples) == 5
    for sample, key in zip(samples, KEYS[:5], strict=True):
        about = json.loads(sample["json"])
        assert about == {"key": key, "name": f"n{key}", "num_words": 3, "model": "m"} | {
            name: None for name in about if name not in ("key", "name", "num_words", "model")
        }
        assert sample["__key__"] == f"{key % 2**64:016x}"
        assert sample["txt"].decode() == TEXTS[key]
        assert sample["png" if key == 7 else "jpg"] == (
            PNG if key == 7 else JPEG + bytes([key % 250])
        )
    # Our own listing reads them, too.
    files, _ = list_images(tmp_path / "listing", str(tmp_path / "out"))
    index = RowIndex.open(files)
    reader = RowReader(index)
    found = sorted(reader.row(row)["image"] for row in range(len(index)))
    assert found == sorted(sample.get("jpg", sample.get("png")) for sample in samples)


def test_a_killed_export_goes_on_and_a_finished_one_is_kept(
    tables: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions, images = tables
    whole = tmp_path / "whole"
    counts = write_shards(captions, str(whole), images, rows_per_shard=2)
    expected = {file.name: file.read_bytes() for file in whole.glob("*.tar")}
    assert sorted(expected) == ["000000.tar", "000001.tar", "000002.tar"]
    write_shard, out = shards._write_shard, tmp_path / "out"

    def killed(folder: Path, number: int, *rest: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return write_shard(folder, number, *rest)

    monkeypatch.setattr(shards, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(captions, str(out), images, rows_per_shard=2)
    assert "000001.tar" not in {file.name for file in out.glob("*.tar")}
    monkeypatch.setattr(shards, "_write_shard", write_shard)
    before = (out / "000000.tar").stat().st_mtime_ns
    for _ in range(2):
        assert write_shards(captions, str(out), images, rows_per_shard=2) == counts
        assert {file.name: file.read_bytes() for file in out.glob("*.tar")} == expected
        assert (out / "000000.tar").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="holds another run \\(rows_per_shard"):
        write_shards(captions, str(out), images, rows_per_shard=3)


def test_what_cannot_be_exported(tables: tuple[str, str], tmp_path: Path) -> None:
    captions, images = tables
    with pytest.raises(DataError, match="has no column 'image': give images="):
        write_shards(captions, str(tmp_path / "a"), None, 2)
    with pytest.raises(DataError, match="has no column 'caption'"):
        write_shards(images, str(tmp_path / "a"), images, 2)
    with pytest.raises(RunError, match="is not empty and holds no export"):
        write_shards(captions, str(tmp_path), images, 2)
    other = Table(tmp_path / "other")
    other.create("image", {}, 1)
    rows = [{"key": 99, "image": {"bytes": JPEG}, "status": "ok"}]
    other.write(0, pa.Table.from_pylist(rows, schema=IMAGE_ROW))
    with pytest.raises(DataError, match=r"none of the 6 captions of .* has an image"):
        write_shards(captions, str(tmp_path / "b"), str(other.folder), 2)
