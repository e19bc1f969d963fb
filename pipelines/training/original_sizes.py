"""Height and width of the images in the list, which SDXL reads where `model.time_ids` is `original`."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.images.random_access import RowIndex, RowReader
from pipelines.storage.tables import parquet_files

COLUMNS = ("original_height", "original_width")


class OriginalSizes:
    """Reads the original sizes of an image table's rows by key."""

    def __init__(self, path: str) -> None:
        """Raises DataError for a table that does not have the columns."""
        self._index = RowIndex.open(parquet_files(path), needed=COLUMNS)
        self._rows = RowReader(self._index, COLUMNS, image=False)

    def read(self, keys: list[int]) -> torch.Tensor:
        """Height and width of each image, int64 `[n 2]`."""
        positions = np.searchsorted(self._index.keys, np.array(keys, np.int64))
        rows = [self._rows.row(int(position)) for position in positions]
        return torch.tensor([[row[name] for name in COLUMNS] for row in rows])
