"""The images that a job processes: the settings `data.*` of all jobs over images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from pipelines.cli.config import InputPathOrUrl, OutputPathOrUrl, one_or_more
from pipelines.images.listing import list_images
from pipelines.images.random_access import in_holdout, usable_rows
from pipelines.pictures.formats import Encoding
from pipelines.storage.files import as_path
from pipelines.storage.tables import Table
from vlv_model.config import Config

if TYPE_CHECKING:
    from pipelines.pictures.squares import Decoding

_BUFFER_KEYS = 1_000_000  # keys held in memory while searching for the smallest


class ImageInput(Config):
    """The images at `data.input`, wherever they lie."""

    input: InputPathOrUrl = Field(
        description="the images: a table written by ingest; Parquet with an image column (bytes, or Hugging "
        "Face's struct); .tar shards (WebDataset, img2dataset); a folder of image files; on a disk, at "
        "s3:// or hf://"
    )
    image_column: str | None = Field(
        None, description="image column of Parquet; default: the only possible one"
    )
    key_column: str | None = Field(
        None,
        description="column of Parquet that identifies its rows: integers, or texts, which are hashed "
        "(`url` gives the same keys as ingest); `__key__`, in every layout: the file's name without "
        "folder and suffix; default: `key`, or else the path and the row's position",
    )
    where: str | None = Field(
        None,
        description="SQL condition on columns of the input that selects rows, e.g. "
        "\"aesthetic >= 6 and alt_text like '%dog%'\"",
    )
    features: Annotated[tuple[InputPathOrUrl, ...], BeforeValidator(one_or_more)] = Field(
        (),
        description="feature tables (jobs/embed.py) whose scores `where` can use, joined by key: "
        "[TABLE, …]; they replace columns of the same name",
    )
    image_encoding: Encoding = Field(
        "file",
        description="file: JPEG, PNG and other image files; chw, hwc: raw uint8 arrays of 3·s·s or s·s·3 "
        "bytes; npy: NumPy files; --dry-run shows a sample picture",
    )

    @model_validator(mode="after")
    def _features_are_used(self) -> ImageInput:
        if self.features and self.where is None:
            raise ValueError(
                "data.features joins scores for data.where, which is missing: give a condition, such as "
                "data.where='aesthetic >= 6'"
            )
        return self

    def decoding(self) -> Decoding:
        """How the images become squares: strangers' files are decoded in a child process."""
        from pipelines.pictures.squares import Decoding

        return Decoding(self.image_encoding, isolated=not self.is_own_table)

    @property
    def is_own_table(self) -> bool:
        """Whether the input is a table of this pipeline: ingest has decoded every image in it."""
        return Table(self.input).exists


class Selection(ImageInput):
    """The images that a job processes, and where it writes its own table."""

    output: OutputPathOrUrl = Field(description="folder of the output table")
    split: Literal["all", "train", "holdout"] = Field(
        "all", description="all images, those used in training, or those held out from it"
    )
    holdout: float = Field(0.02, gt=0, lt=1, description="held-out share, as set in training")
    limit: int | None = Field(
        None, ge=1, description="at most this many images, those with the smallest keys"
    )
    rows_per_chunk: int = Field(
        256, ge=1, le=65_536, description="rows per chunk, the unit of commits"
    )

    def images(self, again: bool = False) -> tuple[list[Path], dict[str, Any]]:
        """The Parquet files of a table of the images, and the settings that identify it.

        See `list_images`: foreign images are listed first, or `again`.
        """
        request = (self.input, self.image_column, self.key_column, self.where)
        output, encoding = as_path(self.output), self.image_encoding
        return list_images(output, *request, again=again, encoding=encoding, features=self.features)

    def usable_rows(self, files: Sequence[Path]) -> Iterator[np.ndarray]:
        """The rows of files that can be processed, as `random_access.usable_rows` gives them."""
        return usable_rows(files)

    def chosen(
        self, files: Sequence[Path], among: np.ndarray | None = None
    ) -> Callable[[np.ndarray], np.ndarray]:
        """A function from keys int64 `[n]` to the mask bool `[n]` of the selected ones.

        `among`: only these keys can be selected. With `limit`, all keys of `files` are read.
        """
        allowed = None if among is None else np.unique(among)

        def mask(keys: np.ndarray) -> np.ndarray:
            selected = np.ones(len(keys), bool)
            if self.split != "all":
                held_out = in_holdout(keys, self.holdout)
                selected &= held_out if self.split == "holdout" else ~held_out
            if allowed is not None:
                selected &= _is_in_sorted(keys, allowed)
            return selected

        if self.limit is None:
            return mask
        batches = (rows["key"] for rows in self.usable_rows(files))
        last = _kth_smallest(self.limit, (batch[mask(batch)] for batch in batches))
        return lambda keys: mask(keys) & (keys <= last)


def _is_in_sorted(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which keys `[n]` occur in the sorted `values`: bool `[n]`."""
    if not len(values):
        return np.zeros(len(keys), bool)
    positions = np.minimum(np.searchsorted(values, keys), len(values) - 1)
    found: np.ndarray = values[positions] == keys
    return found


def _kth_smallest(k: int, batches: Iterable[np.ndarray], buffer_keys: int = _BUFFER_KEYS) -> int:
    """The k-th smallest key; if there are fewer keys, the largest.

    At most about `k + buffer_keys` keys are in memory.
    """
    smallest, buffer, buffered = np.zeros(0, np.int64), [np.zeros(0, np.int64)], 0
    for keys in itertools.chain(batches, [None]):
        if keys is not None:
            buffer.append(keys)
            buffered += len(keys)
        if keys is None or buffered > k + buffer_keys:
            smallest, buffer, buffered = np.concatenate([smallest, *buffer]), [], 0
            if len(smallest) > k:
                smallest = np.partition(smallest, k - 1)[:k]
    return int(smallest.max()) if len(smallest) else 0
