"""The texts of a job over captions: rows of our own tables as they are, others listed once.

A listing holds `key`, `name`, the text and `status`, so that a condition is evaluated once and the rows
of another tool have keys. Texts are small, unlike images: they are copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.images.conditions import Where, small_columns
from pipelines.images.listing import DESCRIPTION, FOLDER, row_keys
from pipelines.images.random_access import NAMES
from pipelines.images.rows import OK, check_status, require_columns
from pipelines.images.scores import Scores, scores_fingerprint
from pipelines.images.sources import is_integer
from pipelines.storage.files import is_file, is_url, write_atomically
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.folders import files_below, remove_folder
from pipelines.storage.parquet import open_parquet, read_schema, write_parquet
from pipelines.storage.tables import PLAN, Table, parquet_files, read_json_object
from vlv_model.errors import DataError

_BATCH_ROWS = 1 << 15
_ROW_GROUP = 1024


def list_texts(
    output: Path,
    path: str,
    column: str,
    key_column: str | None = None,
    where: str | None = None,
    again: bool = False,
    features: Sequence[str] = (),
) -> tuple[list[Path], dict[str, Any]]:
    """The Parquet files with the texts at `path`, and the settings that identify them.

    The counterpart of `list_images`; the caller must hold the lock on `output`. Raises DataError if
    there are no rows, or the column or a key is missing.
    """
    files = parquet_files(path)
    if Table(path).exists and where is None and key_column is None:
        require_columns(read_schema(files[0]), ["key", column], str(files[0]))
        return files, {}
    request: dict[str, Any] = {
        "input": path,
        "text": column,
        "key": key_column,
        "where": where,
        "features": list(features),
    }
    identity = {
        "layout": "text",
        "files": size_fingerprint({file.name: file for file in files}),
        "scores": scores_fingerprint(features),
    }
    description = output / DESCRIPTION
    recorded = read_json_object(description) if is_file(description) else {}
    same_request = recorded.get("asked") == request
    # With a table, the caller compares the identity and refuses.
    may_list = not Table(output).exists or (again and same_request)
    if recorded != {"asked": request, **identity} and may_list:
        if not is_url(output):
            description.parent.mkdir(parents=True, exist_ok=True)
        # Until the listing is complete, it answers no request.
        write_atomically(description, json.dumps({"asked": request, "files": "unfinished"}))
        if not _write(output, files, column, key_column, where, features):
            what = f"no row for which {where}" if where is not None else "no row"
            raise DataError(f"data.input={path} has {what}")
        write_atomically(description, json.dumps({"asked": request, **identity}))
    found = [file for file in files_below(output / FOLDER) if file.suffix == PLAN]
    return found, {name: value for name, value in identity.items() if value is not None}


def _write(
    output: Path,
    files: list[Path],
    column: str,
    key_column: str | None,
    where: str | None,
    features: Sequence[str],
) -> int:
    remove_folder(output / FOLDER)
    if not is_url(output):
        (output / FOLDER).mkdir(parents=True)
    condition = Where(where) if where is not None else None
    rows = written = 0
    with Scores(features) if features else nullcontext() as scores:
        for file in files:
            for table in _rows(file, column, key_column, condition, scores):
                if table.num_rows:
                    part = output / FOLDER / f"{written:06d}{PLAN}"
                    write_parquet(part, table, row_group_size=_ROW_GROUP)
                    rows, written = rows + table.num_rows, written + 1
    return rows


def _rows(
    file: Path,
    column: str,
    key_column: str | None,
    condition: Where | None,
    scores: Scores | None,
) -> Iterator[pa.Table]:
    schema = read_schema(file)
    key = key_column or ("key" if is_integer(schema, "key") else None)
    if key is None:
        raise DataError(
            f"{file} has no column `key` of integers: name one with data.key_column (`url` gives the "
            f"keys of ingest); it has {', '.join(schema.names)}"
        )
    require_columns(schema, [key, column], str(file))
    check_status(schema, str(file))
    name = next((n for n in NAMES if n in schema.names), None)
    wanted = {key, column} | {n for n in ("status", name) if n and n in schema.names}
    wanted |= set(small_columns(schema)) if condition is not None else set()
    with open_parquet(file) as parquet:
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=sorted(wanted)):
            rows = pa.Table.from_batches([batch])
            keys = np.array(row_keys(rows[key].to_pylist(), key), np.int64)
            names = rows[name].cast(pa.string()) if name else [str(k) for k in keys]
            listed = pa.table(
                {
                    "key": keys,
                    "name": names,
                    column: rows[column],
                    "status": rows["status"] if "status" in wanted else [OK] * len(keys),
                }
            )
            if condition is not None:
                joined = scores.join(rows, keys) if scores else rows
                listed = listed.filter(pa.array(condition.mask(joined)))
            yield listed
