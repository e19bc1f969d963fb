"""External sort on a full disk. The order of rows is tested with the plans of ingest."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.storage.sorting import ExternalSort, original_key, spread_keys
from vlv_model.errors import RunError


def test_full_disk_error_names_the_folder_and_tmpdir() -> None:
    rows = pa.table({"key": [1, 2]})
    sort = ExternalSort(rows.schema, 0, buffer_rows=1)

    class Full:
        def write_table(self, rows: pa.Table) -> Any:
            raise OSError(errno.ENOSPC, "Error writing bytes to file")

        def close(self) -> None: ...

    sort._streams = [Full()]
    with pytest.raises(
        RunError, match=r"vlv-sort-\w+ \(temporary files; TMPDIR chooses the disk\) cannot"
    ):
        sort.add(rows)
    sort.remove()


def test_spread_keys_can_be_mapped_back() -> None:
    keys = np.array([0, 1, 2, -1, -(2**63), 2**63 - 1])
    spread = spread_keys(keys)
    assert [original_key(int(key)) for key in spread] == keys.tolist()
    assert np.abs(np.diff(spread[:3].astype(float))).min() > 2**60
