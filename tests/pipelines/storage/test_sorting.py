"""Sorting on disk: what a full one says. What is sorted is tested with the plans of ingest."""

from __future__ import annotations

import errno
from typing import Any

import pyarrow as pa
import pytest

from pipelines.storage.sorting import Buckets
from vlv_model.errors import RunError


def test_a_full_disk_is_named_with_the_switch_that_chooses_another() -> None:
    rows = pa.table({"key": [1, 2]})
    buckets = Buckets(rows.schema, 0, waiting_rows=1)

    class Full:
        def write_table(self, rows: pa.Table) -> Any:
            raise OSError(errno.ENOSPC, "Error writing bytes to file")

        def close(self) -> None: ...

    buckets._streams = [Full()]
    with pytest.raises(
        RunError, match=r"vlv-sort-\w+ \(temporary files, where TMPDIR says\) cannot"
    ):
        buckets.add(rows)
    buckets.remove()
