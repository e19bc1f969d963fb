"""Finds the tables of what is evaluated: a caption or feature table, or a folder of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow.compute as pc

from pipelines.images.features import KIND as FEATURES
from pipelines.images.features import FeatureTable
from pipelines.images.rows import OK, check_status, require_columns
from pipelines.storage.files import as_path, is_file
from pipelines.storage.folders import is_folder, names_in
from pipelines.storage.parquet import open_parquet, read_schema
from pipelines.storage.tables import Table, parquet_files
from vlv_model.errors import DataError

ANSWERS = "answers.jsonl"
"""What a reader has answered, beside the report; a killed run leaves it."""

_DEPTH = 3  # folders below the one that was given
_CAPTION = "caption"


@dataclass(frozen=True)
class CaptionTable:
    """Captions by key, of recaption or of any Parquet with `key` and `caption`. Held in memory."""

    path: str
    files: tuple[Path, ...]

    @cached_property
    def captions(self) -> dict[int, str]:
        """The first caption of each key with status ok."""
        return dict(reversed(list(read_captions(self.files))))

    def named_captions(self) -> Iterator[tuple[str, str]]:
        """File name and caption of each key; DataError if the table has no names."""
        for file in self.files:
            with open_parquet(file) as parquet:
                require_columns(parquet.schema_arrow, ["key", "name"], str(file))
                for batch in parquet.iter_batches(columns=["key", "name"]):
                    for row in batch.to_pylist():
                        if row["name"] and row["key"] in self.captions:
                            yield row["name"], self.captions[row["key"]]


@dataclass(frozen=True)
class Subject:
    """A captioner or model, with its tables by their names below its folder."""

    name: str
    path: str
    features: dict[str, FeatureTable] = field(default_factory=dict)
    captions: dict[str, CaptionTable] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)  # paths of tables of reconstruct


def find_subject(path: str, name: str, setting: str = "input") -> Subject:
    """The tables at `path`, which is one or a folder of them; DataError if there is none."""
    found = Subject(name, path)
    root = as_path(path)
    if not is_file(root) and not is_folder(root):
        raise DataError(f"{setting}={path} does not exist: give a table, or a folder of tables")
    for where in _tables(root, _DEPTH):
        label = str(where)[len(str(root)) :].strip("/")
        kind = Table(where).describe()["kind"]
        if kind == FEATURES:
            found.features[label] = FeatureTable(str(where), setting)
        elif kind == "caption":
            found.captions[label] = CaptionTable(
                str(where), tuple(parquet_files(str(where), setting))
            )
        elif kind == "reconstruction":
            found.pictures[label] = str(where)
    if not (found.features or found.captions):
        try:
            files = parquet_files(path, setting)
            require_columns(read_schema(files[0]), ["key", _CAPTION], str(files[0]))
        except DataError as error:
            raise DataError(
                f"{setting}={path} holds no caption or feature table, nor Parquet with key and caption "
                f"({error})"
            ) from None
        found.captions[""] = CaptionTable(path, tuple(files))
    return found


def names_of(paths: tuple[str, ...]) -> list[str]:
    """A short name for each path: its last part, or more of it where two are the same."""
    parts = [path.rstrip("/").split("/") for path in paths]
    if len(set(paths)) < len(paths):
        raise DataError("input has the same path twice: give each table once")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def read_captions(files: tuple[Path, ...] | list[Path]) -> Iterator[tuple[int, str]]:
    """Key and caption of every row with a caption, and of status ok where there is a status."""
    for file in files:
        with open_parquet(file) as parquet:
            schema = parquet.schema_arrow
            require_columns(schema, ["key", _CAPTION], str(file))
            check_status(schema, str(file))
            has_status = "status" in schema.names
            columns = ["key", _CAPTION, *(["status"] if has_status else [])]
            for batch in parquet.iter_batches(columns=columns):
                rows = batch.filter(pc.equal(batch["status"], OK)) if has_status else batch
                rows = rows.filter(pc.and_(rows["key"].is_valid(), rows[_CAPTION].is_valid()))
                yield from zip(rows["key"].to_pylist(), rows[_CAPTION].to_pylist(), strict=True)


def _tables(folder: Path, depth: int) -> Iterator[Path]:
    if Table(folder).exists:
        yield folder
    elif depth and is_folder(folder):
        for name in names_in(folder):
            if is_folder(folder / name):
                yield from _tables(folder / name, depth - 1)
