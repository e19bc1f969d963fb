"""Which images a value names: a key, a URL in any spelling, or a file name."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.images.rows import key_of
from pipelines.images.urls import addresses_of
from pipelines.lists.metadata import as_text
from pipelines.lists.readers import read_parquet
from pipelines.storage.parquet import read_schema
from pipelines.training.captions import Join, joinable
from vlv_model.errors import DataError

_BATCH_ROWS = 65_536
_COLUMNS: dict[Join, tuple[str, ...]] = {
    "url": ("url", "name"),
    "name": ("name", "url"),
    "stem": ("name", "url"),
}
"""Columns of the images with these values, by preference: a listing names images by URL, too."""


@dataclass(frozen=True)
class _Lookup:
    """Keys of images by a hash of their value; a value may belong to several images."""

    hashes: np.ndarray  # int64 [n], ascending
    keys: np.ndarray  # int64 [n]

    @classmethod
    def of(cls, hashes: np.ndarray, keys: np.ndarray) -> _Lookup:
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], keys[order])

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For hashes int64 `[m]`: (position in `hashes`, key) of each match, int64 `[k]`."""
        first = np.searchsorted(self.hashes, hashes, "left")
        counts = np.searchsorted(self.hashes, hashes, "right") - first
        rows = np.repeat(np.arange(len(hashes)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.keys[first[rows] + within]


class ImageJoin:
    """Finds the usable images that values name. In memory: 16 bytes an image, for names 32."""

    def __init__(self, join_on: Join, files: Sequence[Path], keys: np.ndarray) -> None:
        """`files` of the images, and the keys, int64 `[n]` ascending, of the usable ones.

        A name is the whole name of an image, or its last part, if only one image has that; likewise a
        stem is a name without its suffix. Raises
        DataError if the images have no URLs or names.
        """
        self.join_on = join_on
        self.ambiguous = np.zeros(0, np.int64)  # hashes of last parts that several images have
        if join_on == "key":
            self._whole = _Lookup(keys, keys)
            return
        hashes, found, last = [], [], []
        for image_keys, values in _image_values(join_on, files):
            is_usable = isin_sorted(image_keys, keys)
            found.append(image_keys[is_usable])
            values = values.filter(pa.array(is_usable))
            if join_on == "stem":
                stems = [posixpath.splitext(name)[0] for name in values.to_pylist()]
                values = pa.chunked_array([pa.array(stems, pa.string())])
            hashes.append(self._hashes(values))
            if join_on != "url":
                last.append(_hashes_of_last(values))
        found_keys = np.concatenate(found) if found else keys[:0]
        self._whole = _Lookup.of(np.concatenate(hashes) if hashes else keys[:0], found_keys)
        if join_on != "url":
            named = _Lookup.of(np.concatenate(last) if last else keys[:0], found_keys)
            repeated = np.zeros(len(named.hashes), bool)
            repeated[1:] = named.hashes[1:] == named.hashes[:-1]
            repeated[:-1] |= repeated[1:]
            self.ambiguous = np.unique(named.hashes[repeated])
            self._last = _Lookup(named.hashes[~repeated], named.keys[~repeated])

    def find(self, values: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, int]:
        """For values `[m]` without nulls: (position, image's key) of each match, and how many of the
        values have no match because they name several images.
        """
        if self.join_on == "key":
            return *self._whole.find(values.to_numpy()), 0
        rows, keys = self._whole.find(self._hashes(values))
        if self.join_on == "url" or len(np.unique(rows)) == len(values):
            return rows, keys, 0
        others = np.setdiff1d(np.arange(len(values)), rows)
        last = _hashes_of_last(values.take(pa.array(others)))
        more, more_keys = self._last.find(last)
        ambiguous = int(isin_sorted(last, self.ambiguous).sum())
        return np.concatenate([rows, others[more]]), np.concatenate([keys, more_keys]), ambiguous

    def _hashes(self, values: pa.ChunkedArray) -> np.ndarray:
        if self.join_on == "url":
            return addresses_of(values)
        return np.array([key_of(_plain(name)) for name in values.to_pylist()], np.int64)


def last_part(name: str) -> str:
    """The last part of an image's name: its file name."""
    return name.rstrip("/").rpartition("/")[2] or name


def _plain(name: str) -> str:
    return name if name.startswith(("http:", "https:")) else posixpath.normpath(name)


def _hashes_of_last(values: pa.ChunkedArray) -> np.ndarray:
    return np.array([key_of(last_part(name)) for name in values.to_pylist()], np.int64)


def _image_values(
    join_on: Join, files: Sequence[Path]
) -> Iterator[tuple[np.ndarray, pa.ChunkedArray]]:
    """Keys and join values of the images, in batches; rows without a value are left out."""
    for file in files:
        names = read_schema(file).names
        column = next((name for name in _COLUMNS[join_on] if name in names), None)
        if column is None:
            raise DataError(
                f"{file} has no column {' or '.join(map(repr, _COLUMNS[join_on]))} to join captions "
                f"by {join_on} (data.join_on); it has {', '.join(names)}"
            )
        for rows in read_parquet(file, ["key", column], _BATCH_ROWS):
            rows = rows.filter(rows[column].is_valid())
            keys = joinable(rows["key"], "key", f"{file}: column 'key'")
            yield keys.to_numpy(), as_text(rows[column], f"{file}: column '{column}'")


def isin_sorted(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Mask of the values that are in a sorted array; needs no memory of its size."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    found = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[found] == values)
