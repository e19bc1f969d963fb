"""Tables on disk: Parquet parts committed one by one, so that a killed job can continue.

A table is a folder:

    data/part-000007.parquet   one part per chunk of the plan, named after the chunk alone
    README.md                  the dataset card (pipelines/images/card.py)
    _commits/000007.json       written after the part: rows, counts by status, the run that wrote it
    _table.json                kind, identity (the settings that decide its rows), number of chunks
    _plan/                     the input of each chunk, if the job has to record it (`.plan`)
    _published.json            for a table that has to pass a check: written once it has passed

A part without a commit is unfinished work of a killed job; the next run overwrites it. So every chunk
is in the table once, however often a job is killed. A later ingest run replaces a part atomically, and
then its commit.

Only rows have the suffix `.parquet`, because readers disagree on hidden files: Arrow and Spark skip
names that begin with an underscore; DuckDB, polars and `datasets` do not. Tables of earlier versions
have their parts beside `_table.json` and no card.
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
from pipelines.storage.files import (
    as_path,
    is_file,
    is_url,
    read_text,
    read_texts,
    write_atomically,
)
from pipelines.storage.folders import files_below, is_folder, is_hidden, make_folder, names_in
from pipelines.storage.locks import LOCK_FILE
from pipelines.storage.parquet import open_parquet, read_schema, write_parquet
from vlv_model.errors import DataError, RunError, VLVError

TABLE_FILE = "_table.json"
PUBLISHED_FILE = "_published.json"
PARTS = "data"
PLAN = ".plan"  # suffix of plan files, which are Parquet

_READERS = 16  # threads that read small columns

# Rows per row group in tables of images. Reading one image reads its whole row group, and training
# reads single images in random order: with 256 rows it would read 256 times too much.
IMAGE_ROW_GROUP = 16


def read_json_object(path: Path, error: type[VLVError] = RunError) -> dict[str, Any]:
    """The content of a JSON file that a job wrote; raises `error` if it is damaged or missing."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or "it is not JSON"
        raise error(f"{path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise error(f"{path} is damaged: expected a JSON object")
    return content


@dataclass(frozen=True)
class Commit:
    """Summary of a finished chunk, readable without opening its part."""

    chunk: int
    rows: int
    statuses: dict[str, int] = field(default_factory=dict)
    run: int = 1  # number of the run that last wrote it

    def to_json(self) -> str:
        return json.dumps(asdict(self))


ADDED_SETTINGS = {
    "preprocess": "default",
    "data.image_encoding": "file",
    "shift_factor": 0.0,
}
"""Identity settings that older tables do not record, and the values those tables were made with."""

_DECIDED_BY = {
    "weights": "model.path (weights)",
    "parent": "model.path (weights of its stage 1)",
    "base_models": "model.* (base models)",
    "model": "model.*, generate.*",
    "vae": "model.vae",
    "image_size": "model.image_size",
    "preprocess": "model.preprocess",
    "precision": "encode.precision",
    "files": "data.input (files)",
    "rows": "data.input (rows)",
    "layout": "data.input (layout)",
}
"""The settings that decide what of an identity is no setting itself, as an error shows it."""


class Table:
    """A folder of committed Parquet parts; the module's docstring shows its layout."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = as_path(folder)

    # ------------------------------------------------------------------ driver

    @property
    def exists(self) -> bool:
        """Whether the table has been created."""
        return is_file(self.folder / TABLE_FILE)

    def describe(self) -> dict[str, Any]:
        """Content of `_table.json`: kind, identity, chunks, and the planner's notes."""
        content = read_json_object(self.folder / TABLE_FILE)
        if missing := {"kind", "identity", "chunks"} - set(content):
            raise RunError(f"{self.folder / TABLE_FILE} is damaged: it lacks {min(missing)}")
        return content

    def check_same_run(
        self, kind: str, identity: Mapping[str, Any] | None, columns: Collection[str] = ()
    ) -> bool:
        """True if the table exists and this run may continue it; False if the folder is unused.

        Raises RunError if the folder holds something else, naming the settings that differ, or if the
        parts lack some of `columns`, as those of an earlier version may. `identity=None` checks the
        kind only.
        """
        if not self.exists:
            # A job killed while planning leaves these without a table.
            leftovers = ["_plan", "_commits", "_runs", "_chunks.npy"]
            if not names_in(self.folder / PARTS):
                leftovers.append(PARTS)
            check_unused(self.folder, leftovers, "table", "data.output")
            return False
        described = self.describe()
        if described["kind"] != kind:
            raise RunError(
                f"output folder {self.folder} holds another run ({described['kind']} table, "
                f"not {kind}): choose another data.output"
            )
        if identity is None:
            return True
        recorded = with_added(described["identity"], identity)
        required = [name for name, value in identity.items() if value is not None]
        self._check_version("setting", required, recorded)
        shown = [
            {_DECIDED_BY.get(name, name): value for name, value in values.items()}
            for values in (recorded, identity)
        ]
        check_same_settings(self.folder, shown[0], shown[1], "data.output")
        if columns and (files := self._commit_files()):
            names = read_schema(self.part(int(files[0].stem))).names
            self._check_version("column", columns, names)
        return True

    def _check_version(
        self, what: str, required: Collection[str], recorded: Collection[str]
    ) -> None:
        if missing := [name for name in required if name not in recorded]:
            raise RunError(
                f"the table in {self.folder} was made by an earlier version, without the {what} "
                f"{', '.join(missing)}: choose another data.output; other jobs can still read it"
            )

    def create(self, kind: str, identity: Mapping[str, Any], chunks: int, **notes: Any) -> None:
        """Write `_table.json`. This is the last step of planning: a table that exists has its plan.

        `parts` in `_table.json` names the folder of the parts: `data`, as on the Hugging Face hub. They
        need their own folder because Arrow reads every file of a folder whose name has no underscore.
        The parts of an existing table stay where they are.
        """
        notes["parts"] = self.describe().get("parts", "") if self.exists else PARTS
        self.__dict__.pop("parts", None)
        for name in ("_commits", notes["parts"]):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        content = {"kind": kind, "identity": dict(identity), "chunks": chunks, **notes}
        write_atomically(self.folder / TABLE_FILE, json.dumps(content, indent=2))

    def pending(self) -> list[int]:
        """Chunks that are not committed yet, in order."""
        done = {path.stem for path in self._commit_files()}
        chunks = range(self.describe()["chunks"])
        return [chunk for chunk in chunks if f"{chunk:06d}" not in done]

    def commits(self) -> list[Commit]:
        """The commits of all finished chunks, in order."""
        files = self._commit_files()
        if files and is_url(files[0]):
            return [self._parse(text) for text in read_texts(files)]
        return [self._parse(read_text(file)) for file in files]

    def _parse(self, text: str) -> Commit:
        try:
            return Commit(**json.loads(text))
        except (TypeError, ValueError):
            raise RunError(
                f"{self.folder / '_commits'} holds a file that is not a commit"
            ) from None

    def commit(self, chunk: int) -> Commit:
        """The commit of a finished chunk."""
        return self._parse(read_text(self._commit_file(chunk)))

    def _commit_files(self) -> list[Path]:
        files = files_below(self.folder / "_commits")
        return [file for file in files if file.suffix == ".json" and file.stem.isdigit()]

    def counts(self) -> dict[str, int]:
        """Rows by status in all finished chunks: `ok` first, the others by name."""
        total: Counter[str] = Counter()
        for commit in self.commits():
            total.update(commit.statuses)
        return dict(sorted(total.items(), key=lambda item: (item[0] != "ok", item[0])))

    def columns(self, chunks: Sequence[int], names: Sequence[str]) -> Iterator[pa.Table]:
        """Some small columns of the parts of `chunks`, in order; many parts are read concurrently."""

        def read(chunk: int) -> pa.Table:
            with open_parquet(self.part(chunk)) as parquet:
                return parquet.read(columns=list(names))

        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(0, len(chunks), 4 * _READERS):
                yield from readers.map(read, chunks[first : first + 4 * _READERS])

    def incomplete_reason(self) -> str | None:
        """Why other jobs cannot read the table yet, in words; None if they can."""
        description, pending = self.describe(), self.pending()
        if pending:
            return f"is not finished ({len(pending)} of {description['chunks']} chunks are missing)"
        if description.get("checked") and not is_file(self.folder / PUBLISHED_FILE):
            return "is not published (its rows have not passed its job's quality gates)"
        return None

    def publish(self, content: Mapping[str, Any]) -> None:
        """Record that a table with `checked` in its notes has passed its check, with the result."""
        write_atomically(self.folder / PUBLISHED_FILE, json.dumps(dict(content), indent=1))

    # ------------------------------------------------------------------ workers

    def part(self, chunk: int) -> Path:
        """The Parquet file of a chunk."""
        return self.parts / f"part-{chunk:06d}.parquet"

    @cached_property
    def parts(self) -> Path:
        """The folder that contains the parts."""
        return self.folder / (self.describe().get("parts", "") if self.exists else "")

    def write(self, chunk: int, rows: pa.Table, run: int = 1, **options: Any) -> Commit:
        """Write a chunk's part and then its commit; writing it again gives the same table.

        An existing part is replaced: readers see the old one or the new one. `options` are Arrow's.
        """
        write_parquet(self.part(chunk), rows, **options)
        return self._commit(chunk, rows["status"], run)

    def _commit(self, chunk: int, statuses: pa.ChunkedArray, run: int) -> Commit:
        commit = Commit(chunk, len(statuses), dict(Counter(statuses.to_pylist())), run)
        write_atomically(self._commit_file(chunk), commit.to_json())
        return commit

    def update(self, chunk: int, columns: pa.Table, run: int = 1, **options: Any) -> Commit:
        """Replace some columns of a committed part; `status` must be among them.

        The other columns, nearly all bytes of a table of images, are not rewritten. `options` are those
        of `write`, for a part that has to be rewritten after all.
        """
        if not update_columns(self.part(chunk), columns):
            with open_parquet(self.part(chunk)) as parquet:
                rows = parquet.read()
            for name in columns.column_names:
                i = rows.schema.get_field_index(name)
                rows = rows.set_column(i, rows.schema.field(i), columns[name])
            return self.write(chunk, rows, run, **options)
        return self._commit(chunk, columns["status"], run)

    def recommit(self, commit: Commit) -> Commit:
        """Write a commit again, from the part that it describes."""
        with open_parquet(self.part(commit.chunk)) as parquet:
            statuses = parquet.read(columns=["status"])["status"]
        return self._commit(commit.chunk, statuses, commit.run)

    def is_committed(self, chunk: int) -> bool:
        """Whether a chunk is finished; a part alone may be left over from a killed job."""
        return is_file(self._commit_file(chunk))

    def _commit_file(self, chunk: int) -> Path:
        return self.folder / "_commits" / f"{chunk:06d}.json"


def _is_table(folder: Path) -> bool:
    try:
        return Table(folder).exists
    except OSError:  # credentials may be limited to our own folder of a store
        return False


def check_unused(folder: Path, leftovers: Collection[str], what: str, setting: str) -> None:
    """Raise RunError unless `folder` can be created or holds nothing but a job's `leftovers`.

    Also raises RunError for a folder inside a table, whose readers would read its files as rows.
    `what` says in words what the folder was expected to be.
    """
    if outer := next((parent for parent in folder.parents if _is_table(parent)), None):
        raise RunError(
            f"{setting}={folder} is inside the table {outer}, whose readers would read its files as "
            "rows: choose a folder beside it"
        )
    make_folder(folder, setting)
    names = names_in(folder)
    # Hidden files that end in 32 hex digits are temporary files of `write_atomically`.
    allowed = {*leftovers, LOCK_FILE}
    others = [n for n in names if n not in allowed and not re.fullmatch(r"\..*[0-9a-f]{32}", n)]
    if others:
        raise RunError(
            f"{setting}={folder} is not empty and holds no {what} ({others[0]}, …): "
            f"choose another {setting}"
        )


def with_added(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings, with those of `current` that were added since."""
    return {k: v for k, v in ADDED_SETTINGS.items() if k in current} | dict(recorded)


def check_same_settings(
    folder: Path, recorded: Mapping[str, Any], current: Mapping[str, Any], setting: str
) -> None:
    """Raise RunError naming the first settings in which the run in `folder` and this one differ.

    Values are compared as JSON stores them.
    """
    recorded, current = (json.loads(json.dumps(values)) for values in (recorded, current))
    keys = [k for k in {**recorded, **current} if recorded.get(k) != current.get(k)]
    if keys:
        shown = ", ".join(
            f"{k}: {_short(recorded.get(k))} there, {_short(current.get(k))} here" for k in keys[:3]
        )
        raise RunError(
            f"output folder {folder} holds another run ({shown}): "
            f"choose another {setting}, or remove the folder"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:140]}…{text[-140:]}"


def parquet_files(path: str, setting: str = "data.input", published: bool = True) -> list[Path]:
    """The Parquet files at `path`: a table's committed parts, a folder's files, or the one file.

    Raises DataError if there are none, or if a table is not finished, or (with `published`) has not
    been published.
    """
    where = as_path(path)
    if is_file(where):
        return [where]
    table = Table(where)
    if table.exists:
        if (reason := table.incomplete_reason()) and (published or table.pending()):
            raise DataError(f"{setting}={path}: this table {reason}: rerun the job that writes it")
        files = [table.part(commit.chunk) for commit in table.commits()]
    else:
        depth = len(where.parts)
        found = (p for p in files_below(where) if p.suffix == ".parquet")
        # Arrow and Spark skip hidden files and folders too.
        files = [p for p in found if not any(map(is_hidden, p.parts[depth:]))]
    if not files:
        what = "has no Parquet files" if is_folder(where) else "does not exist"
        raise DataError(f"{setting}={path} {what}: expected a Parquet file or a folder of them")
    return files


def plan_file(file: Path) -> Path:
    """The plan file `file`, or the `.parquet` that an earlier version wrote in its place."""
    earlier = file.with_suffix(".parquet")
    return earlier if not is_file(file) and is_file(earlier) else file
