"""Quarantine: an image that kills its process, again and again, becomes a row with a failed status.

An exception in a step stays with its row. But an image can also end the process: by a crash in native
code, or by its memory. Ray then repeats the whole chunk without end. So each attempt is recorded in the
table, where the next one reads it:

    _deaths/000007.json    {"begun": 3, "alone": {"41": 1}}     removed when the chunk is finished

The first attempts process the chunk as a whole, because most processes die for another reason: a lost
machine, a kill. From the third attempt on, rows are processed one at a time, first those during which the
process died. A row that kills three processes alone is quarantined: its status is `…:failed`. A blank
image is processed before them: where it kills the process too, the images are not to blame, and the job
ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.execution.progress import BUSY, PRESENT
from pipelines.images.rows import OK
from pipelines.storage.files import is_file, remove_file, write_atomically
from pipelines.storage.tables import read_json_object
from vlv_model.errors import RunError, VLVError

FOLDER = "_deaths"
MOST_WHOLE = 2
"""Attempts at a chunk as a whole."""
MOST_ALONE = 3
"""Processes that one row may kill before it is quarantined."""
_BLANK = -1  # the row number of the blank image


class Attempts:
    """The attempts at one chunk, this one included."""

    def __init__(self, file: Path) -> None:
        self.file = file
        record = read_json_object(file) if is_file(file) else {}
        self.begun: int = record.get("begun", 0) + 1
        self.alone = {int(row): deaths for row, deaths in record.get("alone", {}).items()}
        self._write()

    @property
    def row_by_row(self) -> bool:
        """Whether this attempt processes one row at a time."""
        return self.begun > MOST_WHOLE

    def order(self, rows: int) -> list[int]:
        """The row numbers, suspects first: what precedes a death is done again."""
        return sorted(range(rows), key=lambda row: row not in self.alone)

    def is_quarantined(self, row: int) -> bool:
        return self.alone.get(row, 0) >= MOST_ALONE

    @contextmanager
    def suspecting(self, row: int) -> Iterator[None]:
        """Blame a death of the process in here on `row`. An exception is no death."""
        before = self.alone.get(row, 0)
        self.alone[row] = before + 1
        self._write()
        try:
            yield
        except BaseException:
            self.alone[row] = before
            self._write()
            raise
        # Written with the next record: a row that killed once and not again is no suspect.
        del self.alone[row]

    def end(self) -> None:
        """Remove the record of a finished chunk."""
        remove_file(self.file)

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps({"begun": self.begun, "alone": self.alone}))


class GuardedStep:
    """The actor of a step that holds a model; rows that kill it are quarantined.

    `step` is a class with a `failed` status. A call takes a chunk with the columns `pixels` and `status`
    and leaves rows alone whose status is not ok. The result has two more columns, whose sums over the
    chunk are the seconds that the step took (`busy`) and those since the chunk before (`present`).
    """

    def __init__(self, step: type, arguments: tuple[Any, ...], table: Path) -> None:
        self.refusal: VLVError | None = None
        try:
            self.step: Callable[[pa.Table], pa.Table] = step(*arguments)
        except VLVError as error:
            # Ray would take an error of a constructor for a death, repeat it, and hide its message.
            self.refusal = error
        self.failed: str = step.failed  # type: ignore[attr-defined]
        self.folder = table / FOLDER
        self.last_end: float | None = None

    def __call__(self, chunk: pa.Table) -> pa.Table:
        if self.refusal is not None:
            raise self.refusal
        (number,) = chunk["chunk"].unique().to_pylist()
        attempts = Attempts(self.folder / f"{number:06d}.json")
        start = time.monotonic()
        rows = self._row_by_row(chunk, attempts) if attempts.row_by_row else self.step(chunk)
        end = time.monotonic()
        attempts.end()
        present = end - (start if self.last_end is None else self.last_end)
        self.last_end = end
        for name, seconds in ((BUSY, end - start), (PRESENT, present)):
            share = np.full(rows.num_rows, seconds / max(1, rows.num_rows))
            rows = rows.append_column(name, pa.array(share))
        return rows

    def _row_by_row(self, chunk: pa.Table, attempts: Attempts) -> pa.Table:
        usable = [value == OK for value in chunk["status"].to_pylist()]
        if any(usable):
            self._try_blank(chunk.slice(usable.index(True), 1), attempts)
        results: dict[int, pa.Table] = {}
        for row in attempts.order(chunk.num_rows):
            one = chunk.slice(row, 1)
            if attempts.is_quarantined(row):
                why = f"the process died {attempts.alone[row]} times while it worked on this image"
                results[row] = self.step(_with(one, status=self.failed, error=why, pixels=None))
            elif usable[row]:
                with attempts.suspecting(row):
                    results[row] = self.step(one)
            else:
                results[row] = self.step(one)
        return pa.concat_tables([results[row] for row in range(chunk.num_rows)])

    def _try_blank(self, one: pa.Table, attempts: Attempts) -> None:
        if attempts.is_quarantined(_BLANK):
            attempts.end()
            raise RunError(
                f"the model's process died {MOST_WHOLE + MOST_ALONE} times, with a blank image, too: "
                "the images are not to blame; look into the log of its machine (memory, drivers)"
            )
        (pixels,) = one["pixels"].to_pylist()
        with attempts.suspecting(_BLANK):
            self.step(_with(one, pixels=bytes(len(pixels))))


def _with(rows: pa.Table, **values: Any) -> pa.Table:
    """Rows with one value for all in some columns."""
    for name, value in values.items():
        index = rows.schema.get_field_index(name)
        column = pa.array([value] * rows.num_rows, rows.schema.field(name).type)
        rows = rows.set_column(index, rows.schema.field(name), column)
    return rows
