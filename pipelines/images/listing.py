"""Lists images in foreign formats once, as a table of our layout (pipelines.images.listed_rows).

The listing is written file by file and contains no image bytes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.images.external import (
    COLUMN,
    LISTED_ROW,
)
from pipelines.images.listed_rows import Condition, listed_rows, relative_name
from pipelines.images.rows import require_columns
from pipelines.images.scores import Scores, scores_fingerprint
from pipelines.images.sources import (
    Source,
    find_source,
)
from pipelines.pictures.formats import Encoding
from pipelines.storage.files import is_file, is_url, write_atomically
from pipelines.storage.fingerprints import size_fingerprint
from pipelines.storage.folders import files_below, remove_folder
from pipelines.storage.parquet import read_schema, write_parquet
from pipelines.storage.tables import PLAN, Table, read_json_object
from vlv_model.errors import DataError

FOLDER, DESCRIPTION = "_plan/listing", "_plan/listing.json"
_FILE_ROWS = 1 << 18  # rows per file of the listing
_ROW_GROUP = 1024


def list_images(
    output: Path,
    path: str,
    image_column: str | None = None,
    key_column: str | None = None,
    where: str | None = None,
    setting: str = "data.input",
    again: bool = False,
    encoding: Encoding = "file",
    features: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> tuple[list[Path], dict[str, Any]]:
    """The Parquet files of a table with the images at `path`, and the settings that identify it.

    A table of this pipeline is returned as it is, unless `where` selects rows of it. Anything else is
    listed in `output`, once: a continued job uses the existing listing, unless `again` asks to list the
    same images again. `features` are tables whose scores `where` can use (pipelines.images.scores);
    `texts` are columns of Parquet that the listing has, too. The caller must hold the lock on `output`.
    Raises DataError if there are no images, and ConfigError for an invalid condition.
    """
    request: dict[str, Any] = {
        "input": path,
        "image": image_column,
        "key": key_column,
        "where": where,
    }
    if encoding != "file":  # earlier versions recorded none
        request["encoding"] = encoding
    if features:
        request["features"] = list(features)
    if texts:
        request["texts"] = list(texts)
    description = output / DESCRIPTION
    recorded = recorded_listing(output)
    same_request = recorded is not None and recorded["asked"] == request
    if recorded is not None and same_request and recorded["layout"] == "folder":
        # Checking whether millions of files have changed costs as much as listing them.
        return _listing_files(output), {"layout": "folder"}
    source = find_source(path, image_column, key_column, setting, encoding)
    if source.layout == "table" and where is None:
        return list(source.files), {}
    identity = {"layout": source.layout, "files": _files_fingerprint(source)}
    identity |= {"scores": scores_fingerprint(features)} if features else {}
    if (
        recorded is None
        or not same_request
        or any(recorded.get(k) != v for k, v in identity.items())
    ):
        if Table(output).exists and not (again and same_request):
            return _listing_files(output), identity  # the caller compares the identity and refuses
        # Until the new listing is complete, it answers no request.
        unfinished = {"asked": request, "layout": "unfinished", "files": "unfinished"}
        if not is_url(output):
            description.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(description, json.dumps(unfinished))
        others: Counter[str] = Counter()
        with Scores(features) if features else nullcontext() as scores:
            condition = Condition.of(where, scores)
            written = _write_listing(output, source, key_column, condition, others, texts)
        if not written:
            what = f"no row for which {where}" if where is not None else "no image"
            skipped = f" (and {_suffixes(others)})" if others else ""
            raise DataError(f"{setting}={path} has {what}{skipped}")
        if others:
            print(
                f"warning: {setting}={path}: {others.total():,} files in its shards were skipped, because "
                f"their names are not those of images: {_suffixes(others)}",
                file=sys.stderr,
            )
        write_atomically(description, json.dumps({"asked": request, **identity}))
    return _listing_files(output), identity if source.layout != "folder" else {"layout": "folder"}


def recorded_listing(output: Path) -> dict[str, Any] | None:
    """What the listing in `output` was asked for, and its `layout`; None if there is none."""
    file = output / DESCRIPTION
    return read_json_object(file) if is_file(file) else None


def _suffixes(counts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in counts.most_common(5))


def _listing_files(output: Path) -> list[Path]:
    # Earlier versions wrote `.parquet`.
    return [file for file in files_below(output / FOLDER) if file.suffix in (PLAN, ".parquet")]


def _files_fingerprint(source: Source) -> str | None:
    """The fingerprint of Parquet files or shards; None for image files, which may be millions."""
    if source.layout == "folder":
        return None
    if not source.files:
        return None
    return size_fingerprint({relative_name(file, source.root): file for file in source.files})


def _write_listing(
    output: Path,
    source: Source,
    key_column: str | None,
    condition: Condition | None,
    others: Counter[str],
    texts: Sequence[str],
) -> int:
    """Replace the listing; returns its number of rows. `others` counts skipped files in shards."""
    remove_folder(output / FOLDER)
    if not is_url(output):
        (output / FOLDER).mkdir(parents=True)
    schema = LISTED_ROW
    if source.layout in ("table", "parquet"):
        columns = read_schema(source.files[0])
        require_columns(columns, list(texts), str(source.files[0]))
        schema = pa.schema([*LISTED_ROW, *(columns.field(name) for name in texts)])
        schema = schema.with_metadata({COLUMN: (source.column or "").encode()})
    buffer: list[pa.Table] = []
    written, rows = 0, 0

    def flush() -> None:
        nonlocal written
        file = output / FOLDER / f"{written:06d}{PLAN}"
        write_parquet(file, pa.concat_tables(buffer), row_group_size=_ROW_GROUP)
        buffer.clear()
        written += 1

    for table in listed_rows(source, key_column, condition, others, texts=texts):
        buffer.append(table.cast(schema))
        rows += table.num_rows
        if sum(t.num_rows for t in buffer) >= _FILE_ROWS:
            flush()
    if buffer:
        flush()
    return rows
