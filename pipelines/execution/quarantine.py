"""Quarantine: an image that kills its process, again and again, becomes a row with a failed status.

An exception in a step stays with its row. But an image can also end the process: by a crash in native
code, or by its memory. Ray then repeats the process's chunks without end. So each attempt is recorded
in the table, where the next one reads it:

    _deaths/000007.json    {"begun": 3, "alone": {"41": 1}}     removed when the chunk is committed

The first attempt processes the chunk together with others. A death makes a suspect of each chunk that
the process worked on, and from then on a suspect has its process to itself: so at the second attempt
a chunk dies only by itself. The first two attempts process it as a whole, because most processes die
for another reason: a lost machine, a kill. From the third attempt on, rows are processed one at a time,
first those during which the process died. A row that kills three processes alone is quarantined: its
status is `…:failed`. A blank image is processed before them: where it kills the process too, the images
are not to blame, and the job ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.execution.steps import Chunk, ModelDiedError, ModelStep
from pipelines.images.rows import OK
from pipelines.storage.files import is_file, remove_file, write_atomically
from pipelines.storage.tables import read_json_object
from vlv_model.errors import RunError

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
        """Blame a death of the process in here on `row`. Of all exceptions, one is a death."""
        before = self.alone.get(row, 0)
        self.alone[row] = before + 1
        self._write()
        try:
            yield
        except ModelDiedError:  # which ends the process
            raise
        except BaseException:
            self.alone[row] = before
            self._write()
            raise
        # Written with the next record: a row that killed once and not again is no suspect.
        del self.alone[row]

    def end(self) -> None:
        """Remove the record of a chunk."""
        remove_file(self.file)

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps({"begun": self.begun, "alone": self.alone}))


def record_of(table: Path, chunk: int) -> Path:
    """Where the attempts at a chunk of a table are recorded."""
    return table / FOLDER / f"{chunk:06d}.json"


class GuardedStep:
    """A ModelStep whose rows are quarantined where they kill it.

    The records of its chunks are for the one who commits them to remove (`record_of`): a result may be
    lost with the process, if that dies of the next chunk. It also measures the seconds for which a step
    works and waits (`Chunk.busy`, `Chunk.present`).
    """

    def __init__(
        self, step: Callable[..., ModelStep], arguments: tuple[Any, ...], table: Path
    ) -> None:
        self.step = step(*arguments)
        self.failed = self.step.failed
        self.table = table
        self.last_end: float | None = None
        self.waited = 0.0  # seconds since then

    def process(self, chunks: Iterator[Chunk | None]) -> Iterator[Chunk]:
        """The chunks of the step; a chunk that an earlier process left unfinished is done alone."""
        for chunk in self._guarded(self._timed(chunks)):
            end = time.monotonic()
            assert self.last_end is not None
            present = end - self.last_end
            busy, self.waited, self.last_end = max(0.0, present - self.waited), 0.0, end
            yield replace(chunk, busy=busy, present=present)
            self.waited += time.monotonic() - end

    def close(self) -> None:
        self.step.close()

    def _timed(self, chunks: Iterator[Chunk | None]) -> Iterator[Chunk | None]:
        """Chunks; what the step waits for them is counted, from the first one on."""
        while True:
            start = time.monotonic()
            try:
                chunk = next(chunks)
            except StopIteration:
                return
            if self.last_end is None:
                self.last_end = time.monotonic()
            else:
                self.waited += time.monotonic() - start
            yield chunk

    def _guarded(self, chunks: Iterator[Chunk | None]) -> Iterator[Chunk]:
        suspects: list[Chunk] = []

        def first_attempts() -> Iterator[Chunk | None]:
            """Chunks up to the next suspect."""
            for chunk in chunks:
                if chunk is not None:
                    record = record_of(self.table, chunk.number)
                    if is_file(record):
                        suspects.append(chunk)
                        return
                    Attempts(record)
                yield chunk

        while True:
            yield from self.step.process(first_attempts())
            if not suspects:
                return
            yield self._by_itself(suspects.pop())

    def _by_itself(self, chunk: Chunk) -> Chunk:
        """Process a chunk while the step has no other."""
        attempts = Attempts(record_of(self.table, chunk.number))
        return self._row_by_row(chunk, attempts) if attempts.row_by_row else self._whole(chunk)

    def _whole(self, chunk: Chunk) -> Chunk:
        (done,) = self.step.process(iter([chunk]))
        return done

    def _row_by_row(self, chunk: Chunk, attempts: Attempts) -> Chunk:
        rows = [replace(chunk, rows=chunk.rows.slice(row, 1)) for row in range(chunk.rows.num_rows)]
        usable = [value == OK for value in chunk.rows["status"].to_pylist()]
        if any(usable):
            self._try_blank(rows[usable.index(True)], attempts)
        results: dict[int, pa.Table] = {}
        for row in attempts.order(len(rows)):
            one = rows[row]
            if attempts.is_quarantined(row):
                why = f"the process died {attempts.alone[row]} times while it worked on this image"
                one = _with(one, status=self.failed, error=why, pixels=None)
                results[row] = self._whole(one).rows
            elif usable[row]:
                with attempts.suspecting(row):
                    results[row] = self._whole(one).rows
            else:
                results[row] = self._whole(one).rows
        if not rows:
            return self._whole(chunk)
        return replace(chunk, rows=pa.concat_tables([results[row] for row in range(len(rows))]))

    def _try_blank(self, one: Chunk, attempts: Attempts) -> None:
        if attempts.is_quarantined(_BLANK):
            attempts.end()
            raise RunError(
                f"the model's process died {MOST_WHOLE + MOST_ALONE} times, with a blank image, too: "
                "the images are not to blame; look into the log of its machine (memory, drivers)"
            )
        (pixels,) = one.rows["pixels"].to_pylist()
        with attempts.suspecting(_BLANK):
            self._whole(_with(one, pixels=bytes(len(pixels))))


def _with(chunk: Chunk, **values: Any) -> Chunk:
    """A chunk with one value for all rows in some columns."""
    rows = chunk.rows
    for name, value in values.items():
        index = rows.schema.get_field_index(name)
        column = pa.array([value] * rows.num_rows, rows.schema.field(name).type)
        rows = rows.set_column(index, rows.schema.field(name), column)
    return replace(chunk, rows=rows)
