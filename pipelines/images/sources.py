"""Detects the kind of input at `data.input`, from file names and one Parquet schema."""

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

from pipelines.pictures.formats import SUFFIXES, Encoding
from pipelines.storage.files import as_path, is_file, is_url
from pipelines.storage.folders import is_folder, is_hidden, list_remote, matching_files
from pipelines.storage.parquet import read_schema
from pipelines.storage.tables import TABLE_FILE, Table, parquet_files
from vlv_model.errors import DataError

Layout = Literal["table", "parquet", "tar", "folder"]

IMAGES = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif",
    ".tiff", ".avif", ".heic", ".heif", ".heics", ".jp2", ".j2k", ".jpx", ".jxl",
    ".ppm", ".pgm", ".pbm", ".pnm", ".apng", ".ico", ".qoi",
])  # fmt: skip
_COMPRESSED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
_TEXT = re.compile(r"\.(csv|tsv|jsonl|ndjson)(\.gz)?$", re.IGNORECASE)
PREFERRED_COLUMNS = (
    "image",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "img",
    "picture",
    "photo",
    "image_bytes",
)


SAMPLE_KEY = "__key__"
"""WebDataset's name of a sample's key; as `data.key_column`, every layout has it."""


def sample_key(name: str) -> str:
    """The key of a sample: the name of its file without folders, and up to the first dot."""
    return re.split(r"[?#]", name, maxsplit=1)[0].rpartition("/")[2].partition(".")[0]


@dataclass(frozen=True)
class Source:
    """The input at `data.input`."""

    layout: Layout
    root: Path  # names and keys are relative to it
    files: tuple[Path, ...] = ()  # Parquet files, shards, or the image files that a pattern matches
    column: str | None = None  # image column of Parquet
    encoding: Encoding = "file"  # of the images in shards and folders


def find_source(
    path: str,
    image_column: str | None = None,
    key_column: str | None = None,
    setting: str = "data.input",
    encoding: Encoding = "file",
) -> Source:
    """Detect what lies at a path, or what a glob pattern matches.

    With another `encoding` than files, arrays take the place of image files (pipelines.pictures.arrays).
    Raises DataError, one line that says what was found, if there are no images.
    """
    where = as_path(path)
    if Table(where).exists:
        return _parquet(where, parquet_files(path, setting), image_column, key_column)
    found = survey(path, encoding)
    if found is None:
        raise DataError(
            f"{setting}={path} does not exist: expected a table, Parquet, .tar shards or images"
        )
    while found.matched and has_magic(str(where)):
        where = where.parent
    root = where if is_folder(where) else where.parent
    if found.tars:  # img2dataset also writes Parquet files of metadata
        if other := found.image or found.compressed:  # these would be ignored
            raise DataError(
                f"{setting}={path} contains .tar shards and other images ({other.name}): give one kind, "
                f"e.g. {setting}='{path}/**/*.tar'"
            )
        return Source("tar", root, tuple(sorted(found.tars, key=str)), encoding=encoding)
    parquets = sorted(found.parquets, key=str)
    # Parquet beside image files may be just a list of them.
    are_images = not found.image or image_column is not None
    if parquets and (are_images or image_columns(read_schema(parquets[0]))):
        return _parquet(root, parquets, image_column, key_column)
    if found.image:
        chosen = tuple(file for file in found.matched if is_image(file.name, encoding))
        return Source("folder", where, chosen, encoding=encoding)
    if archives := [suffix for suffix in (".gz", ".tgz", ".zip", ".zst") if found.others[suffix]]:
        raise DataError(
            f"{setting}={path} contains {archives[0]} files: decompress them; .tar files can stay"
        )
    if found.tables:
        raise DataError(
            f"{setting}={path} contains tables ({found.tables[0].name}, …): give the path of one of them"
        )
    others = ", ".join(f"{n} {s or 'without suffix'}" for s, n in found.others.most_common(5))
    raise DataError(
        f"{setting}={path} contains no Parquet files, .tar shards or images; "
        f"it has {others or 'no files'}"
    )


def is_image(name: str, encoding: Encoding = "file") -> bool:
    """Whether the suffix of a file name is that of an image, or of an array in this encoding."""
    return os.path.splitext(name)[1].lower() in _suffixes(encoding)


def _suffixes(encoding: Encoding) -> frozenset[str]:
    return IMAGES if encoding == "file" else SUFFIXES[encoding]


class Found:
    """The files found in a folder, by kind."""

    def __init__(self, encoding: Encoding) -> None:
        self.suffixes = _suffixes(encoding)
        self.matched: list[Path] = []  # by a pattern
        self.tars: list[Path] = []
        self.parquets: list[Path] = []
        self.texts: list[Path] = []  # files of rows as text
        self.tables: list[Path] = []  # folders of tables, which are skipped
        self.image: Path | None = None  # any one of them
        self.compressed: Path | None = None  # one compressed shard
        self.others: Counter[str] = Counter()

    def add(self, file: Path) -> None:
        suffix = file.suffix.lower()
        if suffix == ".tar":
            self.tars.append(file)
        elif suffix == ".parquet":
            if not file.name.startswith("_"):  # like Spark's summary files
                self.parquets.append(file)
        elif suffix in self.suffixes:
            self.image = file
        elif file.name == TABLE_FILE:
            self.tables.append(file.parent)
        else:
            self.others[suffix] += 1
            if _TEXT.search(file.name):
                self.texts.append(file)
            if _COMPRESSED_TAR.search(file.name):
                self.compressed = file


def survey(path: str, encoding: Encoding = "file") -> Found | None:
    """The files at a path, or those that a glob pattern matches, by kind; None if nothing is there."""
    where = as_path(path)
    if not is_file(where) and is_folder(where):
        return _scan(where, encoding)
    found = Found(encoding)
    if is_file(where):
        found.add(where)
        return found
    found.matched = matching_files(path) if has_magic(path) else []
    for file in found.matched:
        found.add(file)
    return found if found.matched else None


def _scan(folder: Path, encoding: Encoding) -> Found:
    found = Found(encoding)
    for parent, names in walk(folder):
        for name, _ in names:
            # One image of many is enough.
            if not (found.image and is_image(name, encoding)):
                found.add(parent / name)
    return found


def walk(folder: Path) -> Iterator[tuple[Path, list[tuple[str, int | None]]]]:
    """Each folder at any depth, with its files' names and, in an object store, their sizes.

    In a store a name may begin with a slash: see `pipelines.storage.folders.list_remote`. From a table
    inside the folder only `_table.json` is returned: its files are a job's output, not input. Raises
    DataError for a folder that cannot be read and for a link to a folder outside.
    """
    if is_url(folder):
        stack = [folder]
        while stack:  # fsspec's own walk skips a folder if the store fails
            parent = stack.pop()
            entries = list_remote(parent)
            folders = [n for n, info in entries.items() if info["type"] == "directory"]
            if TABLE_FILE in entries and parent != folder:
                yield parent, [(TABLE_FILE, None)]
                continue
            files = {n: info["size"] for n, info in entries.items() if info["type"] == "file"}
            yield parent, [(name, size) for name, size in files.items() if _is_visible(name)]
            stack += [parent / name for name in reversed(folders) if not is_hidden(name)]
        return
    for path, folders, names in os.walk(folder, onerror=_raise_data_error):
        if TABLE_FILE in names and path != str(folder):
            folders.clear()
            names = [TABLE_FILE]
        # Folders of this pipeline and of other tools: plans, commits, .git.
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for link in (os.path.join(path, name) for name in folders):
            if os.path.islink(link):
                _check_inside(link, folder)
        yield Path(path), [(name, None) for name in sorted(names) if name[0] != "."]


def _is_visible(name: str) -> bool:
    """Whether neither the file nor a folder in its name is hidden."""
    *folders, last = name.split("/")
    return not last.startswith(".") and not any(map(is_hidden, folders))


def _raise_data_error(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None


def _check_inside(link: str, folder: Path) -> None:
    """Raise DataError for a link to outside `folder`; a link inside it adds nothing new."""
    target = os.path.realpath(link)
    if not Path(target).is_relative_to(os.path.realpath(folder)):
        raise DataError(
            f"{link} is a link to {target}, and links to folders are not followed: replace the link by "
            "the folder, or process that folder separately"
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
    if key_column not in (None, SAMPLE_KEY, *schema.names):
        raise DataError(
            f"data.key_column={key_column}: {files[0]} has {', '.join(schema.names) or 'no columns'}"
        )
    return Source("parquet", root, tuple(files), column)


def image_column_of(schema: pa.Schema, named: str | None, where: str) -> str:
    """The image column: the given one, or the only possible one.

    Raises DataError, with the file's columns, if there is none or more than one.
    """
    present = ", ".join(f"{field.name} ({field.type})" for field in schema) or "no columns"
    found = image_columns(schema)
    if named is not None:
        if named not in found:
            raise DataError(
                f"data.image_column={named}: expected bytes or a struct of bytes and path; "
                f"{where} has {present}"
            )
        return named
    preferred = [name for name in PREFERRED_COLUMNS if name in found]
    if len(found) == 1 or preferred[:1] == ["image"]:
        return preferred[0] if preferred else found[0]
    if not found:
        raise DataError(
            f"{where} has no image column (bytes, or a struct of bytes and path); it has {present}"
        )
    raise DataError(
        f"{where} has several columns that may be images ({', '.join(found)}): "
        "choose one with data.image_column"
    )


def is_integer(schema: pa.Schema, name: str) -> bool:
    """Whether the schema has an integer column of this name."""
    return name in schema.names and bool(pa.types.is_integer(schema.field(name).type))


def image_columns(schema: pa.Schema) -> list[str]:
    """The columns that may contain images: bytes, or structs with `bytes`."""

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
