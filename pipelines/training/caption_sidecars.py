"""Captions beside their images: sidecar files in folders and tar shards, and columns of listed Parquet.

    a/1.jpg  a/1.txt    the caption is the text, without white space at its ends
    a/1.jpg  a/1.json   … or a text, or a list of texts, in its field `data.caption_column`

The text wins, unless another field than `caption` is asked for. Shards are WebDataset's or img2dataset's.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import has_magic
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, ClassVar

import pyarrow as pa

from pipelines.images.companions import JSON, TEXTS
from pipelines.images.external import as_utf8
from pipelines.images.sources import is_image, walk
from pipelines.lists.readers import SUFFIXES, format_of, read_parquet
from pipelines.storage.files import as_path, is_file, read_bytes
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.folders import is_folder, matching_files
from pipelines.storage.parquet import open_parquet, read_schema
from pipelines.storage.tables import Table
from pipelines.training.captions import DEFAULT_COLUMN, SETTING, Join, as_texts, usable
from vlv_model.errors import DataError

_MAX_BYTES = 16 << 20  # of a sidecar; a larger one is no caption
_BATCH = 16_384
_THREADS = 8
_DAMAGES = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, OSError)

Sidecar = tuple[str, list[str]]
"""The name of a file below the root, without its suffix, and the captions in it."""


@dataclass(frozen=True)
class SidecarSource:
    """The sidecars of a folder, or of tar shards; they name images by path without suffix."""

    path: str
    root: Path
    shards: tuple[Path, ...]  # none: the files of a folder
    column: str
    join_on: ClassVar[Join] = "stem"

    def batches(self, counts: Counter[str]) -> Iterator[pa.Table]:
        """As CaptionSource.batches. Raises DataError for a sidecar that cannot be read."""
        with ThreadPoolExecutor(_THREADS) as pool:
            found = self._of_shards(pool) if self.shards else self._of_folder(pool)
            while batch := list(islice(found, _BATCH)):
                pairs = [(name, text) for name, texts in batch for text in texts]
                values, captions = zip(*pairs, strict=True) if pairs else ((), ())
                columns = {"value": values, "caption": captions}
                yield usable(
                    pa.table({n: pa.array(column, pa.string()) for n, column in columns.items()}),
                    counts,
                )

    def describe(self) -> str:
        """Shards by their sizes; image files and sidecars may be millions and are not compared."""
        if not self.shards:
            return "sidecars in a folder"
        files = {str(shard)[len(str(self.root)) :]: shard for shard in self.shards}
        return f"{len(files)} shards, {size_fingerprint(files)}"

    def size(self, images: int) -> int:
        return images * 256  # a guess: it only divides the work

    def _of_shards(self, pool: ThreadPoolExecutor) -> Iterator[Sidecar]:
        for first in range(0, len(self.shards), _THREADS):
            yield from _flat(pool.map(self._of_shard, self.shards[first : first + _THREADS]))

    def _of_shard(self, shard: Path) -> list[Sidecar]:
        name = str(shard)[len(str(self.root).rstrip("/")) + 1 :]
        found = []
        try:
            with shard.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in iter(tar.next, None):
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
                    if member.isreg() and _is_sidecar(member.name, self.column):
                        path = f"{name}/{as_utf8(member.name)}"
                        found.append((path, _bounded(tar.extractfile(member), member.size, path)))
        except _DAMAGES as error:
            if isinstance(error, OSError):
                raise DataError(f"{SETTING}: {shard} cannot be read: {error}") from None
            # The intact part counts, as it does for images.
        return list(_captions(found, self.column))

    def _of_folder(self, pool: ThreadPoolExecutor) -> Iterator[Sidecar]:
        for parent, names in walk(self.root):
            folder = str(parent)[len(str(self.root).rstrip("/")) + 1 :]
            sidecars = [name for name, _ in names if _is_sidecar(name, self.column)]
            stems = {os.path.splitext(name)[0] for name in sidecars if not _is_json(name)}
            wanted = [n for n in sidecars if not (_is_json(n) and os.path.splitext(n)[0] in stems)]
            files = ((f"{folder}/{name}" if folder else name, parent / name) for name in wanted)
            while batch := list(islice(files, _BATCH)):
                contents = pool.map(lambda item: (item[0], _read(item[1])), batch)
                yield from _captions(contents, self.column)


def find_sidecars(path: str, column: str) -> SidecarSource | None:
    """The sidecars at `path`; None for a table or a list, which CaptionSource reads.

    A folder has sidecars if one lies beside its image, or if it has texts but no list.
    """
    where = as_path(path)
    if Table(where).exists:
        return None
    if is_file(where):
        return SidecarSource(path, where.parent, (where,), column) if _is_shard(where) else None
    if not is_folder(where):
        shards = tuple(filter(_is_shard, matching_files(path))) if has_magic(path) else ()
        while has_magic(str(where)):
            where = where.parent
        return SidecarSource(path, where, shards, column) if shards else None
    shards, has_texts, has_lists = (), False, False
    for parent, found in walk(where):
        names = [name for name, _ in found]
        shards += tuple(parent / name for name in names if _is_shard(Path(name)))
        beside = {os.path.splitext(name)[0] for name in names if is_image(name)}
        sidecars = [os.path.splitext(name) for name in names if _is_sidecar(name, DEFAULT_COLUMN)]
        if any(stem in beside for stem, _ in sidecars) and not shards:
            return SidecarSource(path, where, (), column)
        has_texts |= any(suffix.lower() != JSON for _, suffix in sidecars)
        has_lists |= any(format_of(Path(name)) in SUFFIXES[:-1] for name in names)
    if shards:
        return SidecarSource(path, where, shards, column)
    return SidecarSource(path, where, (), column) if has_texts and not has_lists else None


def _is_shard(file: Path) -> bool:
    return file.suffix.lower() == ".tar"


def _is_json(name: str) -> bool:
    return name.lower().endswith(JSON)


def _is_sidecar(name: str, column: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    hidden = os.path.basename(name)[:1] == "."
    return not hidden and (suffix == JSON or (suffix in TEXTS and column == DEFAULT_COLUMN))


def _bounded(stream: IO[bytes] | None, size: int, name: str) -> bytes:
    if stream is None or size > _MAX_BYTES:
        raise DataError(f"{SETTING}: {name} has {size:,} bytes and is no caption")
    return stream.read()


def _read(file: Path) -> bytes:
    try:
        return read_bytes(file, most=_MAX_BYTES)
    except OSError as error:
        raise DataError(f"{SETTING}: {file} cannot be read: {error.strerror or error}") from None


def _captions(files: Iterable[tuple[str, bytes]], column: str) -> Iterator[Sidecar]:
    """The captions of files that lie together, in their order; a text wins over a JSON file."""
    found: dict[str, tuple[bool, list[str]]] = {}
    for name, content in files:
        stem = os.path.splitext(name)[0]
        is_text = not _is_json(name)
        try:
            text = content.decode("utf-8-sig")
            texts = [text.strip()] if is_text else _texts_of(json.loads(text), column)
        except UnicodeDecodeError:
            raise DataError(f"{SETTING}: {name} is not UTF-8: convert it to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{SETTING}: {name} is not JSON: {str(error)[:120]}") from None
        if is_text or not found.get(stem, (False, []))[0]:
            found[stem] = (is_text, texts)
    return ((stem, texts) for stem, (_, texts) in found.items())


def _texts_of(content: Any, column: str) -> list[str]:
    value = content.get(column) if isinstance(content, dict) else None
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    "".join(texts).encode()  # raises for a lone surrogate
    return texts


def _flat(batches: Iterable[list[Sidecar]]) -> Iterator[Sidecar]:
    return (sidecar for batch in batches for sidecar in batch)


@dataclass(frozen=True)
class ListedSource:
    """A column of the Parquet files whose images `data.input` lists; rows by key."""

    path: str
    files: tuple[Path, ...]  # of the listing
    column: str
    join_on: ClassVar[Join] = "key"

    def batches(self, counts: Counter[str]) -> Iterator[pa.Table]:
        """As CaptionSource.batches."""
        for file in self.files:
            for rows in read_parquet(file, ["key", "image", "group", "row"], _BATCH):
                places = zip(
                    (image["path"] for image in rows["image"].to_pylist()),
                    *(rows[name].to_pylist() for name in ("group", "row", "key")),
                    strict=True,
                )
                for (path, group), run in groupby(places, lambda place: place[:2]):
                    _, _, positions, keys = zip(*run, strict=True)
                    parquet = as_path(path)
                    captions = self._group(parquet, group).take(pa.array(positions))
                    table = pa.table({"value": pa.array(keys, pa.int64()), "caption": captions})
                    yield usable(as_texts(table, parquet, self.column), counts)

    def describe(self) -> str:
        return ""  # the images are compared, and these are their files

    def size(self, images: int) -> int:
        return images * 256

    def _group(self, file: Path, group: int) -> pa.ChunkedArray:
        if self.column not in read_schema(file).names:
            names = ", ".join(read_schema(file).names)
            raise DataError(
                f"{file} has no column '{self.column}' (data.caption_column); it has {names}"
            )
        with open_parquet(file) as parquet:
            return parquet.read_row_group(group, columns=[self.column])[self.column]
