"""The first step of a chunk of captions: reads them."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa

from pipelines.execution.steps import Chunk
from pipelines.images.plans import plan_index, read_plan
from pipelines.images.random_access import RowReader
from pipelines.images.rows import OK
from pipelines.storage.files import as_path
from pipelines.storage.tables import Table


class ReadTexts:
    """First step of a chunk: its rows' keys and texts.

    The rows are those of ReadImages. `pixels` has the text in UTF-8, where a row of an image has its
    square: so quarantine treats both alike.
    """

    def __init__(self, table: Table, column: str) -> None:
        self.folder, self.column = table.folder, column
        self.files = [as_path(file) for file in table.describe()["files"]]

    def __call__(self, chunk: Chunk) -> Chunk:
        plan = read_plan(self.folder, chunk.number)
        reader = RowReader(plan_index(self.files, plan), [self.column], image=False, named=True)
        texts = [reader.row(position)[self.column] for position in range(plan.num_rows)]
        columns = {
            "key": plan["key"],
            "name": pa.array(reader.names(), pa.string()),
            "pixels": pa.array([text.encode() for text in texts], pa.binary()),
            "status": pa.array([OK] * plan.num_rows, pa.string()),
            "error": pa.nulls(plan.num_rows, pa.string()),
        }
        return replace(chunk, rows=pa.table(columns))
