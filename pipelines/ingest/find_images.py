"""Finds out whether `data.input` of an ingest has images or a list of URLs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from pipelines.images.sources import PREFERRED_COLUMNS, find_source, image_columns, survey
from pipelines.ingest import img2dataset
from pipelines.ingest.local_images import LocalImages, present_columns
from pipelines.lists.input_files import input_files
from pipelines.lists.metadata import match_columns
from pipelines.lists.readers import format_of, read_tables
from pipelines.pictures.formats import Encoding
from pipelines.storage.files import as_path, is_file
from pipelines.storage.parquet import read_schema
from pipelines.storage.tables import Table
from vlv_model.errors import DataError


def find_images(
    path: str,
    image_column: str | None,
    columns: Mapping[str, str | None],
    encoding: Encoding = "file",
) -> LocalImages | None:
    """The images at `data.input`, files or arrays of an `encoding`; None for a list of URLs.

    Parquet with both a URL and an image column holds images. Raises DataError for a mixture of images and
    lists, and as `find_source` does.
    """
    where = as_path(path)
    if not is_file(where) and Table(where).exists:
        return LocalImages(path, find_source(path, image_column, encoding=encoding), columns)
    try:
        found = survey(path, encoding)
    except DataError:  # a link to a folder elsewhere: lists are found behind it, images are not
        if _are_lists(path):
            return None
        raise
    if found is None:
        return None
    parquets = sorted(found.parquets, key=str)
    schema = read_schema(parquets[0]) if parquets else None
    named = image_column is not None or encoding != "file"
    are_images = schema is not None and _has_images(schema, named, columns, parquets[0])
    if found.others[".tfrecord"] and not are_images:
        raise DataError(
            f"data.input={path} contains .tfrecord files, which are not read: rewrite them as .tar shards "
            "(docs/img2dataset.md has a script), or give img2dataset's Parquet files alone as a list of URLs"
        )
    if not (found.tars or found.image or are_images):
        if schema is not None and img2dataset.is_metadata(schema):
            print(
                f"data.input={path} has the metadata of img2dataset without its images: it is a list of URLs",
                file=sys.stderr,
            )
        is_archive = found.compressed and not (parquets or found.texts)
        return LocalImages(path, find_source(path), columns) if is_archive else None
    lists = [] if are_images else parquets
    metadata: tuple[Path, ...] = ()
    if lists and schema is not None and img2dataset.is_metadata(schema):
        lists, metadata = [], tuple(lists)
    _check_notes([*lists, *found.texts], columns, path)
    return LocalImages(path, find_source(path, image_column, encoding=encoding), columns, metadata)


def _are_lists(path: str) -> bool:
    """Whether `data.input` has lists of URLs, and no Parquet with images."""
    try:
        files = input_files(path)
    except DataError:
        return False
    return not any(
        format_of(file) == ".parquet" and image_columns(read_schema(file)) for file in files[:1]
    )


def _has_images(
    schema: pa.Schema, named: bool, columns: Mapping[str, str | None], file: Path
) -> bool:
    """Whether a Parquet file holds images. Lists of URLs may have other columns of bytes.

    `named`: settings say that there are images.
    """
    candidates = image_columns(schema)
    if not candidates or named:
        return bool(candidates)
    found = match_columns(schema, present_columns(columns, schema), str(file))
    if "url" not in found:
        return True
    rest = [name for name in candidates if name not in found.values()]
    structs = [name for name in rest if pa.types.is_struct(schema.field(name).type)]
    return bool(structs or {*PREFERRED_COLUMNS} & {*rest})


def _check_notes(files: Sequence[Path], columns: Mapping[str, str | None], path: str) -> None:
    """Raise DataError if one of the files beside images is a list of URLs; one warning for all others."""
    for file in files:
        try:
            batch = next(iter(read_tables(file)), pa.table({}))
            found = match_columns(batch.schema, present_columns(columns, batch.schema), str(file))
        except DataError:
            continue  # no list
        if "url" in found:
            raise DataError(
                f"data.input={path} contains images and a list of URLs ({file.name}): give one of them, "
                f"such as data.input={file}"
            )
    if files:
        print(
            f"warning: data.input={path}: {len(files):,} files beside images are not read (the first: "
            f"{files[0]}): metadata are read from .json and .txt files and from img2dataset's Parquet",
            file=sys.stderr,
        )
