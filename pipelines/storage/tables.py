"""Tables on disk: Parquet parts that are committed one by one, so that a killed job continues.

A table is a folder:

    data/part-000007.parquet   one part for each chunk of the plan; its name depends on nothing else
    README.md                  what the table is, for people and for other readers (pipelines/images/card.py)
    _commits/000007.json       written after the part: rows, counts by status, the run that wrote it
    _table.json                what the table is: kind, identity (the settings that made it), chunks
    _plan/                     the input of each chunk, where a job has to remember it (`.plan`)
    _published.json            of a table that has to pass a check: written when it has

A part without its commit is unfinished work of a killed job: the rerun writes it anew under the
same name. So every chunk is in the table once, however often a job is killed. A later run of ingest
replaces a part in place, whole or not at all, and then its commit.

Rows are the only Parquet files by their suffix, since readers do not agree on what is hidden: Arrow and
Spark pass over names that begin with an underscore; DuckDB, polars and `datasets` do not. Tables of
earlier versions have their parts beside `_table.json` and no card.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.storage.column_update import update_columns
from pipelines.storage.files import as_path, is_file, read_text, read_texts, write_atomically
from pipelines.storage.folders import files_below, is_folder, is_hidden, make_folder, names_in
from pipelines.storage.locks import LOCK_FILE
from pipelines.storage.parquet import open_parquet, read_schema, write_parquet
from pipelines.storage.protocols import is_url
from vlv_model.errors import DataError, RunError, VLVError

TABLE_FILE = "_table.json"
PUBLISHED_FILE = "_published.json"
PARTS = "data"
PLAN = ".plan"  # suffix of a plan's files, which are Parquet

_READERS = 16  # threads that read small columns of parts

# Rows of a row group in tables of images. A reader of one image takes its whole row group, and
# training reads single images in random order: at 256 rows it would read 256 times too much.
IMAGE_ROW_GROUP = 16


def read_json_object(path: Path, error: type[VLVError] = RunError) -> dict[str, Any]:
    """A JSON file that a job of ours wrote; `error` in one line where it is damaged or gone."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "it is not JSON"
        raise error(f"{path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise error(f"{path} is damaged: expected a JSON object")
    return content


@dataclass(frozen=True)
class Commit:
    """What is known of a finished chunk without opening its part."""

    chunk: int
    rows: int
    statuses: dict[str, int] = field(default_factory=dict)
    run: int = 1  # number of the run that wrote it last

    def to_json(self) -> str:
        return json.dumps(asdict(self))


NEWER = {"preprocess": "default"}
"""Settings of an identity that came after the first tables, and what those were made with."""


class Table:
    """A folder of committed Parquet parts; see the module's text for its layout."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = as_path(folder)

    # ------------------------------------------------------------------ the driver's side

    @property
    def exists(self) -> bool:
        return is_file(self.folder / TABLE_FILE)

    def describe(self) -> dict[str, Any]:
        """Content of `_table.json`: kind, identity, chunks, and what the planner noted."""
        about = read_json_object(self.folder / TABLE_FILE)
        if missing := {"kind", "identity", "chunks"} - set(about):
            raise RunError(f"{self.folder / TABLE_FILE} is damaged: it lacks {min(missing)}")
        return about

    def check_free(
        self, kind: str, identity: Mapping[str, Any] | None, columns: Collection[str] = ()
    ) -> bool:
        """True when the table exists and is this run's; False when the folder is free.

        Raises RunError when the folder holds something else, naming the settings that differ, or
        parts that lack some of `columns`, as those of an earlier version may. With `identity` None only
        the kind is looked at.
        """
        if not self.exists:
            # A job that was killed while it planned leaves these, and no table yet.
            ours = ["_plan", "_commits", "_runs", "_chunks.npy"]
            if not names_in(self.folder / PARTS):
                ours.append(PARTS)
            refuse_strangers(self.folder, ours, "table", "data.output")
            return False
        described = self.describe()
        if described["kind"] != kind:
            raise RunError(
                f"output folder {self.folder} holds another run ({described['kind']} table, "
                f"not {kind}): choose another data.output"
            )
        if identity is None:
            return True
        there = {k: v for k, v in NEWER.items() if k in identity} | described["identity"]
        self._refuse_earlier("setting", [k for k, v in identity.items() if v is not None], there)
        refuse_difference(self.folder, there, identity, "data.output")
        if columns and (files := self._commit_files()):
            self._refuse_earlier(
                "column", columns, read_schema(self.part(int(files[0].stem))).names
            )
        return True

    def _refuse_earlier(self, what: str, now: Collection[str], there: Collection[str]) -> None:
        if missing := [name for name in now if name not in there]:
            raise RunError(
                f"the table in {self.folder} was made by an earlier version, without the {what} "
                f"{', '.join(missing)}: choose another data.output; other jobs can still read it"
            )

    def create(self, kind: str, identity: Mapping[str, Any], chunks: int, **notes: Any) -> None:
        """Declare the table. Done last in planning, so a table that exists has its whole plan.

        `parts` in `_table.json` names the folder of the parts: `data`, as on the hub, since Arrow takes
        every file of a folder for a part whose name has no underscore. Where a table is there already
        its parts stay where they are.
        """
        notes["parts"] = self.describe().get("parts", "") if self.exists else PARTS
        self.__dict__.pop("parts", None)
        for name in ("_commits", notes["parts"]):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        content = {"kind": kind, "identity": dict(identity), "chunks": chunks, **notes}
        write_atomically(self.folder / TABLE_FILE, json.dumps(content, indent=2))

    def pending(self) -> list[int]:
        """Chunks that no job has finished yet, in order."""
        done = {path.stem for path in self._commit_files()}
        chunks = range(self.describe()["chunks"])
        return [chunk for chunk in chunks if f"{chunk:06d}" not in done]

    def commits(self) -> list[Commit]:
        """All finished chunks, in order."""
        files = self._commit_files()
        try:
            if files and is_url(files[0]):
                return [Commit(**json.loads(text)) for text in read_texts(files)]
            return [Commit(**read_json_object(file)) for file in files]
        except (TypeError, ValueError):
            raise RunError(f"{self.folder / '_commits'} holds a file that is no commit") from None

    def commit(self, chunk: int) -> Commit:
        """What is known of one finished chunk."""
        return Commit(**read_json_object(self._commit_file(chunk)))

    def _commit_files(self) -> list[Path]:
        found = files_below(self.folder / "_commits")
        return [file for file in found if file.suffix == ".json" and file.stem.isdigit()]

    def counts(self) -> dict[str, int]:
        """Rows by status over all finished chunks, `ok` first, then by name."""
        total: Counter[str] = Counter()
        for commit in self.commits():
            total.update(commit.statuses)
        return dict(sorted(total.items(), key=lambda item: (item[0] != "ok", item[0])))

    def columns(self, chunks: Sequence[int], names: Sequence[str]) -> Iterator[pa.Table]:
        """Some small columns of the parts of `chunks`, in their order; many are read at a time."""

        def read(chunk: int) -> pa.Table:
            with open_parquet(self.part(chunk)) as parquet:
                return parquet.read(columns=list(names))

        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(0, len(chunks), 4 * _READERS):
                yield from readers.map(read, chunks[first : first + 4 * _READERS])

    def lacks(self) -> str | None:
        """What keeps it from being read by other jobs, in words; None of a finished table."""
        about, pending = self.describe(), self.pending()
        if pending:
            return f"is not finished ({len(pending)} of {about['chunks']} chunks are missing)"
        if about.get("checked") and not is_file(self.folder / PUBLISHED_FILE):
            return "is not published (its rows have not passed the gates of its job)"
        return None

    def publish(self, content: Mapping[str, Any]) -> None:
        """Declare that a table with `checked` in its notes passed; `content` says how it stands."""
        write_atomically(self.folder / PUBLISHED_FILE, json.dumps(dict(content), indent=1))

    # ------------------------------------------------------------------ the worker's side

    def part(self, chunk: int) -> Path:
        return self.parts / f"part-{chunk:06d}.parquet"

    @cached_property
    def parts(self) -> Path:
        """The folder of the parts."""
        return self.folder / (self.describe().get("parts", "") if self.exists else "")

    def write(self, chunk: int, rows: pa.Table, run: int = 1, **options: Any) -> Commit:
        """Write a chunk's part and then its commit. Doing it twice gives the same table.

        A part that is there is replaced: readers see the old one or the new one.
        """
        write_parquet(self.part(chunk), rows, **options)
        return self._committed(chunk, rows["status"], run)

    def _committed(self, chunk: int, statuses: pa.ChunkedArray, run: int) -> Commit:
        commit = Commit(chunk, len(statuses), dict(Counter(statuses.to_pylist())), run)
        write_atomically(self._commit_file(chunk), commit.to_json())
        return commit

    def update(self, chunk: int, columns: pa.Table, run: int = 1, **options: Any) -> Commit:
        """Give the rows of a committed part other values in `columns`, `status` among them.

        All other bytes of the part stay as they are: of a table of images these are nearly all.
        `options` are those of `write`, for a part that has to be written whole.
        """
        if not update_columns(self.part(chunk), columns):
            with open_parquet(self.part(chunk)) as parquet:
                rows = parquet.read()
            for name in columns.column_names:
                at = rows.schema.get_field_index(name)
                rows = rows.set_column(at, rows.schema.field(at), columns[name])
            return self.write(chunk, rows, run, **options)
        return self._committed(chunk, columns["status"], run)

    def is_committed(self, chunk: int) -> bool:
        """False while a chunk's part is not there, or is what a killed job left."""
        return is_file(self._commit_file(chunk))

    def _commit_file(self, chunk: int) -> Path:
        return self.folder / "_commits" / f"{chunk:06d}.json"


def _is_table(folder: Path) -> bool:
    try:
        return Table(folder).exists
    except OSError:  # a store may let us see our own folder alone
        return False


def refuse_strangers(folder: Path, ours: Collection[str], what: str, setting: str) -> None:
    """Raise RunError when `folder` is not a folder, or holds what no job of ours left there.

    Also when it lies in a table: readers of that one would take its rows for their own.
    """
    if outer := next((one for one in folder.parents if _is_table(one)), None):
        raise RunError(
            f"{setting}={folder} lies in the table {outer}, whose readers would take its files for rows "
            f"of theirs: choose a folder beside it"
        )
    make_folder(folder, setting)
    names = names_in(folder)
    # Hidden files of 32 hex digits are temporary ones of `write_atomically`.
    ours = {*ours, LOCK_FILE}
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


def parquet_files(path: str, setting: str = "data.input", published: bool = True) -> list[Path]:
    """The Parquet files of a table of ours (committed parts only), of a folder, or the one file.

    Raises DataError where there is nothing, and where a table of ours is not finished, or not
    `published`.
    """
    where = as_path(path)
    if is_file(where):
        return [where]
    table = Table(where)
    if table.exists:
        if (lacking := table.lacks()) and (published or table.pending()):
            raise DataError(f"{setting}={path}: this table {lacking}: rerun the job that writes it")
        files = [table.part(commit.chunk) for commit in table.commits()]
    else:
        inside = len(where.parts)
        found = (p for p in files_below(where) if p.suffix == ".parquet")
        files = [p for p in found if _is_data(p.parts[inside:])]
    if not files:
        what = "has no Parquet files" if is_folder(where) else "does not exist"
        raise DataError(f"{setting}={path} {what}: expected a Parquet file or a folder of them")
    return files


def _is_data(names: Sequence[str]) -> bool:
    """False in folders and for files that Arrow and Spark pass over too."""
    return not any(map(is_hidden, names))


def plan_file(file: Path) -> Path:
    """Where the file of a plan lies that is called `file` now; earlier versions wrote `.parquet`."""
    earlier = file.with_suffix(".parquet")
    return earlier if not is_file(file) and is_file(earlier) else file
