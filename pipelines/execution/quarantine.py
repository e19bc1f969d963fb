"""Chunks whose process dies each time they are tried: they end, and lose no row but those that kill.

An error in a step stays with its row. But an image can also end the process that works on it: by a
fault of native code, or by memory. Ray starts such a chunk anew, again and again. So what is under
way is noted in the table, and read by the next attempt:

    _deaths/000007.json    {"begun": 3, "alone": {"41": 1}}     removed when the chunk is through

A chunk is tried twice as a whole, since most deaths have another cause: a machine that goes, a kill.
From the third time on its rows are worked on one by one, those first that were under way when the
process died. A row with which it died three times alone gets the status `…:failed`. Before them a
blank image is tried: where that one kills as well, it is not the images, and the job ends.
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
TOGETHER, ALONE = 2, 3  # deaths of a whole chunk, and of a row alone, that are put up with
_BLANK = -1  # among rows: an image of one colour


class Deaths:
    """What is known of the attempts at one chunk, this one included."""

    def __init__(self, file: Path) -> None:
        self.file = file
        noted = read_json_object(file) if is_file(file) else {}
        self.begun: int = noted.get("begun", 0) + 1
        self.alone = {int(row): times for row, times in noted.get("alone", {}).items()}
        self._write()

    @property
    def is_careful(self) -> bool:
        """Whether the rows are to be worked on one by one."""
        return self.begun > TOGETHER

    def order(self, rows: int) -> list[int]:
        """The rows, those first that may kill, as what was done before them would be lost."""
        return sorted(range(rows), key=lambda row: row not in self.alone)

    def is_deadly(self, row: int) -> bool:
        return self.alone.get(row, 0) >= ALONE

    @contextmanager
    def working_on(self, row: int) -> Iterator[None]:
        """Whoever dies meanwhile died of this row. An exception is no death."""
        before = self.alone.get(row, 0)
        self.alone[row] = before + 1
        self._write()
        try:
            yield
        except BaseException:
            self.alone[row] = before
            self._write()
            raise
        # With the next note: what died once and not again is no suspect any more.
        del self.alone[row]

    def end(self) -> None:
        """The chunk is through."""
        remove_file(self.file)

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps({"begun": self.begun, "alone": self.alone}))


class Survivor:
    """A step of a chunk that holds a model, tried as the module's text tells.

    `step` is a class with a `failed` status; its calls take rows with `pixels` and `status`, and
    pass on those whose status is not ok. To each row of a chunk is added its share of the seconds that
    the step took (`busy`), and of those since the chunk before it was through (`present`).
    """

    def __init__(self, step: type, arguments: tuple[Any, ...], table: Path) -> None:
        self.refused: VLVError | None = None
        try:
            self.step: Callable[[pa.Table], pa.Table] = step(*arguments)
        except VLVError as error:
            # Raised here Ray would take it for a death, try again, and hide what it says.
            self.refused = error
        self.failed: str = step.failed  # type: ignore[attr-defined]
        self.folder = table / FOLDER
        self.since: float | None = None  # when the last chunk was through

    def __call__(self, block: pa.Table) -> pa.Table:
        if self.refused is not None:
            raise self.refused
        (chunk,) = block["chunk"].unique().to_pylist()
        deaths = Deaths(self.folder / f"{chunk:06d}.json")
        begun = time.monotonic()
        rows = self._one_by_one(block, deaths) if deaths.is_careful else self.step(block)
        ended = time.monotonic()
        deaths.end()
        present = ended - (begun if self.since is None else self.since)
        self.since = ended
        for name, seconds in ((BUSY, ended - begun), (PRESENT, present)):
            each = np.full(rows.num_rows, seconds / max(1, rows.num_rows))
            rows = rows.append_column(name, pa.array(each))
        return rows

    def _one_by_one(self, block: pa.Table, deaths: Deaths) -> pa.Table:
        usable = [value == OK for value in block["status"].to_pylist()]
        if any(usable):
            self._try_blank(block.slice(usable.index(True), 1), deaths)
        done: dict[int, pa.Table] = {}
        for row in deaths.order(block.num_rows):
            one = block.slice(row, 1)
            if deaths.is_deadly(row):
                why = f"the process died {deaths.alone[row]} times while it worked on this image"
                done[row] = self.step(_with(one, status=self.failed, error=why, pixels=None))
            elif usable[row]:
                with deaths.working_on(row):
                    done[row] = self.step(one)
            else:
                done[row] = self.step(one)
        return pa.concat_tables([done[row] for row in range(block.num_rows)])

    def _try_blank(self, one: pa.Table, deaths: Deaths) -> None:
        if deaths.is_deadly(_BLANK):
            deaths.end()
            raise RunError(
                f"the process of the model died {TOGETHER + ALONE} times, with a blank image, too: it "
                "is not the images; look into its machine's log (memory, drivers)"
            )
        (pixels,) = one["pixels"].to_pylist()
        with deaths.working_on(_BLANK):
            self.step(_with(one, pixels=bytes(len(pixels))))


def _with(rows: pa.Table, **values: Any) -> pa.Table:
    """Rows with other values in some columns."""
    for name, value in values.items():
        index = rows.schema.get_field_index(name)
        column = pa.array([value] * rows.num_rows, rows.schema.field(name).type)
        rows = rows.set_column(index, rows.schema.field(name), column)
    return rows
