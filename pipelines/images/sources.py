"""What kind of images lie at `data.input`, told from the names of files and one Parquet schema."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pipelines.storage.files import as_path, is_file
from pipelines.storage.folders import is_folder, is_hidden, list_remote, matching_files
from pipelines.storage.parquet import read_schema
from pipelines.storage.protocols import is_url
from pipelines.storage.tables import TABLE_FILE, Table, parquet_files
from vlv_model.errors import DataError

Layout = Literal["table", "parquet", "tar", "folder"]

IMAGES = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif",
    ".tiff", ".avif", ".heic", ".heif", ".heics", ".jp2", ".j2k", ".jpx", ".jxl",
    ".ppm", ".pgm", ".pbm", ".pnm", ".apng", ".ico", ".qoi",
])  # fmt: skip
_PACKED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
_LIKELY = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "image_bytes")


@dataclass(frozen=True)
class Source:
    """What lies at `data.input`."""

    layout: Layout
    root: Path  # that names and keys are below of
    files: tuple[Path, ...] = ()  # Parquet files or shards; image files where a pattern names them
    column: str | None = None  # with the images, of Parquet


def find_source(
    path: str,
    image_column: str | None = None,
    key_column: str | None = None,
    setting: str = "data.input",
) -> Source:
    """Tell what lies at a path, or at those that a glob pattern names.

    Raises DataError, one line that says what was found there.
    """
    where, named = as_path(path), []
    if is_file(where):
        found = _Found()
        found.add(where)
    elif Table(where).exists:
        return _parquet(where, parquet_files(path, setting), image_column, key_column)
    elif is_folder(where):
        found = _look(where)
    elif has_magic(path) and (named := matching_files(path)):
        found = _Found()
        for file in named:
            found.add(file)
        while has_magic(str(where)):
            where = where.parent
    else:
        raise DataError(
            f"{setting}={path} does not exist: expected a table, Parquet, .tar shards or images"
        )
    root = where if is_folder(where) else where.parent
    if found.tars:  # img2dataset writes Parquet beside them, of the metadata alone
        if other := found.images or found.packed:  # which would be passed over
            raise DataError(
                f"{setting}={path} holds .tar shards and other images ({other.name}): name one kind, "
                f"as in {setting}='{path}/**/*.tar'"
            )
        return Source("tar", root, tuple(sorted(found.tars, key=str)))
    parquets = sorted(found.parquets, key=str)
    # Beside image files Parquet may be a list of them, without images of its own.
    are_images = not found.images or image_column is not None
    if parquets and (are_images or image_columns(read_schema(parquets[0]))):
        return _parquet(root, parquets, image_column, key_column)
    if found.images:
        return Source("folder", where, tuple(f for f in named if is_image(f.name)))
    if packed := [suffix for suffix in (".gz", ".tgz", ".zip", ".zst") if found.others[suffix]]:
        raise DataError(f"{setting}={path} holds {packed[0]} files: unpack them, to .tar at most")
    if found.tables:
        raise DataError(
            f"{setting}={path} holds tables of ours ({found.tables[0].name}, …): name one of them"
        )
    there = ", ".join(f"{n} {s or 'without suffix'}" for s, n in found.others.most_common(5))
    raise DataError(
        f"{setting}={path} holds no Parquet files, .tar shards or images; "
        f"it has {there or 'no files'}"
    )


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return os.path.splitext(name)[1].lower() in IMAGES


class _Found:
    """The kinds of files that lie in a folder."""

    def __init__(self) -> None:
        self.tars: list[Path] = []
        self.parquets: list[Path] = []
        self.tables: list[Path] = []  # of ours, which are passed over
        self.images: Path | None = None  # one of them
        self.packed: Path | None = None  # one shard that is compressed
        self.others: Counter[str] = Counter()

    def add(self, file: Path) -> None:
        suffix = file.suffix.lower()
        if suffix == ".tar":
            self.tars.append(file)
        elif suffix == ".parquet":
            if not file.name.startswith("_"):  # as Spark's summaries
                self.parquets.append(file)
        elif suffix in IMAGES:
            self.images = file
        elif file.name == TABLE_FILE:
            self.tables.append(file.parent)
        else:
            self.others[suffix] += 1
            if _PACKED.search(file.name):
                self.packed = file


def _look(folder: Path) -> _Found:
    found = _Found()
    for inside, names in walk(folder):
        for name, _ in names:
            # Of many images one is enough to know.
            if not (found.images and is_image(name)):
                found.add(inside / name)
    return found


def walk(folder: Path) -> Iterator[tuple[Path, list[tuple[str, int | None]]]]:
    """Each folder below with its files' names and, in an object store, sizes; one at a time.

    A name may begin with a slash there: see `pipelines.storage.folders.list_remote`.

    Of a table of ours below there is `_table.json` alone: what lies in it is the work of a job, as
    captions with their images beside those they were made of. Raises DataError for a folder that
    cannot be read, and for a link to one outside, whose images would be missing.
    """
    if is_url(folder):
        waiting = [folder]
        while waiting:  # fsspec's own walk passes over a folder that the store does not answer for
            inside = waiting.pop()
            found = list_remote(inside)
            folders = [n for n, one in found.items() if one["type"] == "directory"]
            if TABLE_FILE in found and inside != folder:
                yield inside, [(TABLE_FILE, None)]
                continue
            yield (
                inside,
                [(n, o["size"]) for n, o in found.items() if o["type"] == "file" and _is_shown(n)],
            )
            waiting += [inside / name for name in reversed(folders) if not is_hidden(name)]
        return
    for path, folders, names in os.walk(folder, onerror=_refuse):
        if TABLE_FILE in names and path != str(folder):
            folders.clear()
            names = [TABLE_FILE]
        # Files of ours and of other tools: plans, commits, .git.
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for link in (os.path.join(path, name) for name in folders):
            if os.path.islink(link):
                _check_inside(link, folder)
        yield Path(path), [(name, None) for name in sorted(names) if name[0] != "."]


def _is_shown(name: str) -> bool:
    """Whether a file is one that is meant, by its name and those of the folders in it."""
    *folders, last = name.split("/")
    return not last.startswith(".") and not any(map(is_hidden, folders))


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def _check_inside(link: str, folder: Path) -> None:
    """A link to a folder that is walked through anyway, or back to one, leads to nothing more."""
    target = os.path.realpath(link)
    if not Path(target).is_relative_to(os.path.realpath(folder)):
        raise DataError(
            f"{link} is a link to {target}, and links to folders are not followed: put that folder in "
            "its place, or caption it by itself"
        )


def _parquet(
    root: Path, files: list[Path], image_column: str | None, key_column: str | None
) -> Source:
    schema = read_schema(files[0])
    if (
        is_integer(schema, "key")
        and "image" in image_columns(schema)
        and image_column is None
        and key_column is None
    ):
        return Source("table", root, tuple(files), "image")
    column = image_column_of(schema, image_column, str(files[0]))
    if key_column is not None and key_column not in schema.names:
        raise DataError(
            f"data.key_column={key_column}: {files[0]} has {', '.join(schema.names) or 'no columns'}"
        )
    return Source("parquet", root, tuple(files), column)


def image_column_of(schema: pa.Schema, named: str | None, where: str) -> str:
    """The column that has the images: the one that is named, or the only one that can.

    Raises DataError with the columns that there are.
    """
    there = ", ".join(f"{field.name} ({field.type})" for field in schema) or "no columns"
    found = image_columns(schema)
    if named is not None:
        if named not in found:
            raise DataError(
                f"data.image_column={named}: expected bytes or a struct of bytes and path; "
                f"{where} has {there}"
            )
        return named
    likely = [name for name in _LIKELY if name in found]
    if len(found) == 1 or likely[:1] == ["image"]:
        return likely[0] if likely else found[0]
    if not found:
        raise DataError(
            f"{where} has no image column (bytes, or a struct of bytes and path); it has {there}"
        )
    raise DataError(
        f"{where} has several columns that may be images ({', '.join(found)}): "
        "name one as data.image_column"
    )


def is_integer(schema: pa.Schema, name: str) -> bool:
    """Whether there is such a column, of integers."""
    return name in schema.names and bool(pa.types.is_integer(schema.field(name).type))


def image_columns(schema: pa.Schema) -> list[str]:
    def is_bytes(kind: pa.DataType) -> bool:
        types = pa.types
        return bool(
            types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
        )

    def holds_images(kind: pa.DataType) -> bool:
        if not pa.types.is_struct(kind):
            return is_bytes(kind)
        return any(field.name == "bytes" and is_bytes(field.type) for field in kind)

    return [field.name for field in schema if holds_images(field.type)]
