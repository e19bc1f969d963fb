"""Image files of a table of reconstructions: each original beside the picture that came of it.

<data.output>/_side_by_side/<key>.png   left the square that the encoder saw, right the picture

Underscored, as all that is not a row of the table.
"""

from __future__ import annotations

import io
import sys

import numpy as np
from PIL import Image

from pipelines.images.external import UndecodableImage
from pipelines.images.plans import plan_index, read_plan
from pipelines.images.random_access import RowReader
from pipelines.images.removal import SIDE_BY_SIDE, file_name
from pipelines.images.rows import OK
from pipelines.storage.files import as_path, write_atomically
from pipelines.storage.folders import names_in
from pipelines.storage.parquet import read_parquet_file
from pipelines.storage.protocols import is_url
from pipelines.storage.tables import Table
from vlv_model.squares import Square


def write_files(table: Table, square: Square) -> None:
    """Write the files that a finished table still lacks, of its rows with a picture."""
    from pipelines.pictures.squares import isolated_squares

    folder, about = table.folder / SIDE_BY_SIDE, table.describe()
    if not is_url(folder):
        folder.mkdir(exist_ok=True)
    there = set(names_in(folder))
    files = [as_path(file) for file in about["files"]]
    decode = isolated_squares(square) if about.get("isolated", True) else None
    for commit in table.commits():
        plan = read_plan(table.folder, commit.chunk)
        keys = plan["key"].to_pylist()
        if sum(file_name(key) in there for key in keys) == commit.statuses.get(OK, 0):
            continue
        rows = read_parquet_file(table.part(commit.chunk)).to_pylist()
        made = {row["key"]: row["image"]["bytes"] for row in rows if row["image"]}
        reader = RowReader(plan_index(files, plan), decode=decode)
        for position, key in enumerate(keys):
            if key not in made or file_name(key) in there:
                continue
            try:
                original = reader.square(position, square).transpose(1, 2, 0)
            except UndecodableImage as error:  # gone since
                print(f"no {SIDE_BY_SIDE}/{file_name(key)}: {error}", file=sys.stderr)
                continue
            write_atomically(folder / file_name(key), _joined(original, made[key]))


def _joined(original: np.ndarray, picture: bytes) -> bytes:
    right = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    file = io.BytesIO()
    Image.fromarray(np.hstack([original, right])).save(file, "PNG")
    return file.getvalue()
