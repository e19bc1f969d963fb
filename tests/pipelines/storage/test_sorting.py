"""External sort on a full disk. The order of rows is tested with the plans of ingest."""

from __future__ import annotations

import errno
from typing import Any

import pyarrow as pa
import pytest

from pipelines.storage.sorting import ExternalSort
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
