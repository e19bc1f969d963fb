"""Writes images with their captions as WebDataset shards: `.tar` files of samples.

    000000.tar    00f3….jpg  the image's file as it is stored
                  00f3….txt  the caption
                  00f3….json the other columns of the caption's row, and `key`

A sample is named by its key, as 16 hexadecimal digits of its 64 bits. A shard holds the next
`rows_per_shard` captioned rows of the table; it is written whole or not at all. So a killed export goes on
where it stopped, and an equal one has the same bytes.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.images.external import UndecodableImage
from pipelines.images.listing import list_images
from pipelines.images.random_access import RowIndex, RowReader
from pipelines.images.rows import OK, require_columns
from pipelines.lists.readers import read_parquet
from pipelines.pictures.formats import image_format
from pipelines.storage.files import as_path, is_file, remove_file, write_atomically, write_pieces
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.locks import lock_folder
from pipelines.storage.parquet import read_schema
from pipelines.storage.tables import (
    check_same_settings,
    check_unused,
    parquet_files,
    read_json_object,
)
from vlv_model.errors import DataError

ABOUT = "_export.json"
_THREADS = 4  # shards written concurrently
_LEFT_OUT = ("image", "caption", "status", "error")  # columns that are not in a sample's JSON
_SUFFIX = {"jpeg": "jpg", "tiff": "tif", "jpeg2000": "jp2"}  # of formats that are not named by it


def write_shards(table: str, output: str, images: str | None, rows_per_shard: int) -> Counter[str]:
    """Write the captions of `table` with their images; returns counts of images and of those left out.

    `images` is their source; None: the table has a column `image`. Raises DataError for a table that is
    not published, without captions or without images, and RunError when `output` holds another export.
    """
    folder, files = as_path(output), parquet_files(table, "table")
    for file in files:
        require_columns(read_schema(file), ["key", "caption"], str(file))
    if images is None and "image" not in read_schema(files[0]).names:
        raise DataError(f"{table} has no column 'image': give images=…, what was captioned")
    about = folder / ABOUT
    if not is_file(about):
        check_unused(folder, ("_plan",), "export", "output")
    with lock_folder(folder, "output"):
        image_files = files if images is None else list_images(folder, images, setting="images")[0]
        identity = {
            "table": size_fingerprint({file.name: file for file in files}),
            "images": size_fingerprint({file.name: file for file in image_files}),
            "rows_per_shard": rows_per_shard,
        }
        recorded: dict[str, Any] = dict(read_json_object(about) if is_file(about) else identity)
        done = recorded.pop("counts", None)
        check_same_settings(folder, recorded, identity, "output")
        if done:
            print(f"{folder} is finished: nothing to write", file=sys.stderr)
            return Counter(done)
        write_atomically(about, json.dumps(identity, indent=1))
        counts = _write(folder, files, RowIndex.open(image_files), rows_per_shard)
        if not counts["images"]:
            raise DataError(
                f"none of the {counts['without_image']} captions of {table} has an image"
            )
        write_atomically(about, json.dumps({**identity, "counts": counts}, indent=1))
    return counts


def _write(folder: Path, files: list[Path], index: RowIndex, rows_per_shard: int) -> Counter[str]:
    reader, counts = RowReader(index), Counter[str]()
    running: list[Future[Counter[str]]] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for number, rows in enumerate(_shards(files, rows_per_shard)):
                running.append(pool.submit(_write_shard, folder, number, rows, reader))
                if len(running) > _THREADS:
                    counts += running.pop(0).result()
            counts += sum((shard.result() for shard in running), Counter())
        finally:
            for shard in running:
                shard.cancel()
    return counts


def _shards(files: list[Path], rows_per_shard: int) -> Iterator[pa.Table]:
    """The rows of each shard: those with a caption, in the order of the table."""
    held: list[pa.Table] = []
    for file in files:
        names = [name for name in read_schema(file).names if name != "image"]
        for rows in read_parquet(file, names):
            usable = rows["caption"].is_valid().to_numpy()
            if "status" in names:
                usable &= np.array([status == OK for status in rows["status"].to_pylist()], bool)
            held.append(rows.filter(pa.array(usable)))
            while sum(map(len, held)) >= rows_per_shard:
                together = pa.concat_tables(held, promote_options="default")
                yield together.slice(0, rows_per_shard)
                held = [together.slice(rows_per_shard)]
    if sum(map(len, held)):
        yield pa.concat_tables(held, promote_options="default")


def _write_shard(folder: Path, number: int, rows: pa.Table, reader: RowReader) -> Counter[str]:
    """Write a shard, unless it was written; its counts lie beside it until the export is finished."""
    shard = folder / f"{number:06d}.tar"
    note = folder / "_plan" / f"{number:06d}.json"
    if is_file(shard) and is_file(note):
        return Counter(read_json_object(note))
    counts: Counter[str] = Counter()
    write_pieces(shard, _samples(rows, reader, counts))
    if not counts["images"]:
        remove_file(shard)
        return counts
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(counts))
    return counts


def _samples(rows: pa.Table, reader: RowReader, counts: Counter[str]) -> Iterator[bytes]:
    """The pieces of a shard."""
    index = reader.index
    keys = rows["key"].to_numpy()
    found = np.minimum(np.searchsorted(index.keys, keys), len(index) - 1)
    for row, position in zip(rows.to_pylist(), found.tolist(), strict=True):
        key = row["key"]
        content = _image(reader, position) if index.keys[position] == key else None
        kind = image_format(content) if content else None
        if content is None or kind is None:
            counts["without_image"] += 1
            continue
        counts["images"] += 1
        name = f"{key % 2**64:016x}"
        others = {column: value for column, value in row.items() if column not in _LEFT_OUT}
        yield from _member(f"{name}.{_SUFFIX.get(kind.lower(), kind.lower())}", content)
        yield from _member(f"{name}.txt", row["caption"].encode())
        yield from _member(
            f"{name}.json", json.dumps(others, ensure_ascii=False, default=str).encode()
        )
    yield bytes(2 * tarfile.BLOCKSIZE)


def _image(reader: RowReader, position: int) -> bytes | None:
    try:
        content: bytes | None = reader.row(position)["image"]
    except UndecodableImage:
        return None
    return content


def _member(name: str, content: bytes) -> Iterator[bytes]:
    """A file of a tar archive, owned by nobody and of no time, so that equal shards have equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    yield member.tobuf(tarfile.USTAR_FORMAT)
    yield content
    yield bytes(-len(content) % tarfile.BLOCKSIZE)


def summary(counts: Counter[str], output: str) -> str:
    """The counts in words."""
    left_out = counts["without_image"]
    more = f"; {left_out:,} captions without an image are left out" if left_out else ""
    return f"{counts['images']:,} images with their captions: {output}{more}"
