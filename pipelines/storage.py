"""Tables on disk: Parquet parts that are committed one by one, so that a killed job continues.

A table is a folder:

    part-000007.parquet        one part for each chunk of the plan; its name depends on nothing else
    _commits/000007.json       written after the part: rows and counts by status
    _table.json                what the table is: kind, identity (the settings that made it), chunks
    _plan/                     the input of each chunk, where a job has to remember it

A part without its commit is unfinished work of a killed job: the rerun writes it anew under the
same name. So every chunk is in the table once, however often a job is killed. Names that begin
with an underscore are passed over by Arrow, datasets and Spark.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlv_model.errors import DataError, RunError

TABLE_FILE = "_table.json"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is seen whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    data = content.encode() if isinstance(content, str) else content
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_parquet(path: Path, table: pa.Table, **options: Any) -> None:
    """Write one Parquet file under a temporary name, then give it its own."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    pq.write_table(table, temporary, compression="zstd", **options)
    os.replace(temporary, path)


@dataclass(frozen=True)
class Commit:
    """What is known of a finished chunk without opening its part."""

    chunk: int
    rows: int
    statuses: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"chunk": self.chunk, "rows": self.rows, "statuses": self.statuses})


class Table:
    """A folder of committed Parquet parts; see the module's text for its layout."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    # ------------------------------------------------------------------ the driver's side

    @property
    def exists(self) -> bool:
        return (self.folder / TABLE_FILE).is_file()

    def describe(self) -> dict[str, Any]:
        """Content of `_table.json`: kind, identity, chunks, and what the planner noted."""
        try:
            return json.loads((self.folder / TABLE_FILE).read_text())
        except FileNotFoundError:
            raise DataError(
                f"{self.folder} is not a table of ours: it has no {TABLE_FILE}"
            ) from None
        except ValueError:
            raise DataError(f"{self.folder / TABLE_FILE} is damaged: it is not JSON") from None

    def check_free(self, kind: str, identity: Mapping[str, Any]) -> bool:
        """True when the table exists and is this run's; False when the folder is free.

        Raises RunError when the folder holds something else, naming the settings that differ.
        """
        if not self.exists:
            # A job that was killed while it planned leaves these, and no table yet.
            refuse_strangers(self.folder, ("_plan", "_commits"), "table", "data.output")
            return False
        described = self.describe()
        if described["kind"] != kind:
            raise RunError(
                f"output folder {self.folder} holds another run ({described['kind']} table, "
                f"not {kind}): choose another data.output"
            )
        refuse_difference(self.folder, described["identity"], identity, "data.output")
        return True

    def create(self, kind: str, identity: Mapping[str, Any], chunks: int, **notes: Any) -> None:
        """Declare the table. Done last in planning, so a table that exists has its whole plan."""
        (self.folder / "_commits").mkdir(parents=True, exist_ok=True)
        content = {"kind": kind, "identity": dict(identity), "chunks": chunks, **notes}
        write_atomically(self.folder / TABLE_FILE, json.dumps(content, indent=2))

    def pending(self) -> list[int]:
        """Chunks that no job has finished yet, in order."""
        done = {int(p.stem) for p in (self.folder / "_commits").glob("*.json")}
        return [chunk for chunk in range(self.describe()["chunks"]) if chunk not in done]

    def commits(self) -> list[Commit]:
        """All finished chunks, in order."""
        files = sorted((self.folder / "_commits").glob("*.json"))
        return [Commit(**json.loads(file.read_text())) for file in files]

    def counts(self) -> dict[str, int]:
        """Rows by status over all finished chunks, `ok` first, then by name."""
        total: Counter[str] = Counter()
        for commit in self.commits():
            total.update(commit.statuses)
        return dict(sorted(total.items(), key=lambda item: (item[0] != "ok", item[0])))

    # ------------------------------------------------------------------ the worker's side

    def part(self, chunk: int) -> Path:
        return self.folder / f"part-{chunk:06d}.parquet"

    def write(self, chunk: int, rows: pa.Table, **options: Any) -> Commit:
        """Write a chunk's part and then its commit. Doing it twice gives the same table."""
        statuses = Counter(rows["status"].to_pylist())
        commit = Commit(chunk, rows.num_rows, dict(statuses))
        write_parquet(self.part(chunk), rows, **options)
        write_atomically(self.folder / "_commits" / f"{chunk:06d}.json", commit.to_json())
        return commit


def refuse_strangers(folder: Path, ours: Collection[str], what: str, setting: str) -> None:
    """Raise RunError when `folder` is not a folder, or holds what no job of ours left there."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{setting}={folder} is a file: give a folder for the {what}")
    names = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
    # Hidden files of 32 hex digits are temporary ones of `write_atomically`.
    strangers = [n for n in names if n not in ours and not re.fullmatch(r"\..*[0-9a-f]{32}", n)]
    if strangers:
        raise RunError(
            f"{setting}={folder} is not empty and holds no {what} of ours ({strangers[0]}, …): "
            f"choose another {setting}"
        )


def refuse_difference(
    folder: Path, there: Mapping[str, Any], here: Mapping[str, Any], setting: str
) -> None:
    """Raise RunError naming the first differing settings; compares as JSON would keep them."""
    here = json.loads(json.dumps(here))
    keys = [k for k in {**there, **here} if there.get(k) != here.get(k)]
    if keys:
        shown = ", ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in keys[:3])
        raise RunError(
            f"output folder {folder} holds another run ({shown}): "
            f"choose another {setting}, or remove the folder"
        )


def parquet_files(path: str, setting: str = "data.input") -> list[Path]:
    """The Parquet files of a table of ours (committed parts only), of a folder, or the one file.

    Raises DataError where there is nothing, and where a table of ours is not finished.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    table = Table(place)
    if table.exists:
        if pending := table.pending():
            raise DataError(
                f"{setting}={path}: this table is not finished ({len(pending)} of "
                f"{table.describe()['chunks']} chunks are missing): rerun the job that writes it"
            )
        files = [table.part(commit.chunk) for commit in table.commits()]
    else:
        files = sorted(p for p in place.glob("**/*.parquet") if not p.name.startswith((".", "_")))
    if not files:
        what = "has no Parquet files" if place.is_dir() else "does not exist"
        raise DataError(f"{setting}={path} {what}: expected a Parquet file or a folder of them")
    return files


def read_schema(file: Path) -> pa.Schema:
    """Schema of one Parquet file; DataError where it is none."""
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file: {str(error)[:120]}") from None


def read_rows(files: list[Path], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of some columns, one after the other, in the order of the files."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(256, columns=columns):
                yield from batch.to_pylist()
