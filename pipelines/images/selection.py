"""Which images of a table a job works on: the settings `data.*` of all jobs over images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipelines.cli.config import InputPathOrUrl, OutputPathOrUrl
from pipelines.images.listing import list_images
from pipelines.images.random_access import in_holdout, usable_rows
from pipelines.storage.files import as_path
from pipelines.storage.tables import Table
from vlv_model.config import Config

_WAITING = 1_000_000  # keys in memory among which the smallest are sought


class Selection(Config):
    """Which images of a table a job works on, and where its own table goes."""

    input: InputPathOrUrl = Field(
        description="the images: a table that ingest wrote; Parquet with an image column (bytes, or "
        "Hugging Face's struct); .tar shards (WebDataset, img2dataset); a folder of image files"
    )
    image_column: str | None = Field(
        None, description="column of Parquet that has the images; default: the only one that can"
    )
    key_column: str | None = Field(
        None,
        description="column of Parquet that tells its rows apart (integers, or texts, which are "
        "hashed; of `url` the same keys as ingest's); default: `key`, or the place of the row",
    )
    where: str | None = Field(
        None,
        description="take only rows for which this SQL condition on columns of the input holds, as "
        "in \"aesthetic >= 6 and alt_text like '%dog%'\"",
    )
    output: OutputPathOrUrl = Field(description="folder of the table that is written")
    split: Literal["all", "train", "holdout"] = Field(
        "all", description="all images, or those that training used, or those held out from it"
    )
    holdout: float = Field(0.02, gt=0, lt=1, description="share held out: the same as in training")
    limit: int | None = Field(None, ge=1, description="at most this many images, by smallest key")
    rows_per_chunk: int = Field(
        256, ge=1, le=65_536, description="rows of a chunk, the unit that is committed"
    )

    def images(self, again: bool = False) -> tuple[list[Path], dict[str, Any]]:
        """The files of a table of the images, listed if need be (or `again`), and what they are
        known by.
        """
        asked = (self.input, self.image_column, self.key_column, self.where)
        return list_images(as_path(self.output), *asked, again=again)

    @property
    def is_ours(self) -> bool:
        """Whether the images lie in a table of ours, which lets in what was decoded once alone."""
        return Table(self.input).exists

    def chosen(
        self, files: Sequence[Path], among: np.ndarray | None = None
    ) -> Callable[[np.ndarray], np.ndarray]:
        """What tells which of the keys int64 `[n]` of these files are selected: bool `[n]`.

        `among` are the only keys that can be.
        """
        wanted = None if among is None else np.unique(among)

        def mask(keys: np.ndarray) -> np.ndarray:
            kept = np.ones(len(keys), bool)
            if self.split != "all":
                held = in_holdout(keys, self.holdout)
                kept &= held if self.split == "holdout" else ~held
            if wanted is not None:
                kept &= _occur(keys, wanted)
            return kept

        if self.limit is None:
            return mask
        keys = (rows["key"] for rows in usable_rows(files))
        last = _smallest(self.limit, (some[mask(some)] for some in keys))
        return lambda keys: mask(keys) & (keys <= last)


def _occur(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Which keys `[n]` occur among others, which are sorted: bool `[n]`."""
    if not len(among):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(among, keys), len(among) - 1)
    found: np.ndarray = among[at] == keys
    return found


def _smallest(count: int, batches: Iterable[np.ndarray], most_waiting: int = _WAITING) -> int:
    """The largest of the `count` smallest keys; of fewer, the largest of all.

    `most_waiting` keys beyond these are in memory.
    """
    kept, waiting, number = np.zeros(0, np.int64), [np.zeros(0, np.int64)], 0
    for keys in itertools.chain(batches, [None]):
        if keys is not None:
            waiting.append(keys)
            number += len(keys)
        if keys is None or number > count + most_waiting:
            kept, waiting, number = np.concatenate([kept, *waiting]), [], 0
            if len(kept) > count:
                kept = np.partition(kept, count - 1)[:count]
    return int(kept.max()) if len(kept) else 0
