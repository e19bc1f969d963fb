"""Writes image files of a table of reconstructions.

<data.output>/_side_by_side/<key>.png   the encoder's input square left, its reconstruction right
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
from pipelines.storage.files import as_path, is_url, write_atomically
from pipelines.storage.folders import names_in
from pipelines.storage.parquet import read_parquet_file
from pipelines.storage.tables import Table
from vlv_model.squares import Square


def write_files(table: Table, square: Square) -> None:
    """Write the missing files of a finished table's rows with a reconstruction."""
    from pipelines.pictures.squares import Decoding

    folder, description = table.folder / SIDE_BY_SIDE, table.describe()
    if not is_url(folder):
        folder.mkdir(exist_ok=True)
    existing = set(names_in(folder))
    files = [as_path(file) for file in description["files"]]
    decode = Decoding(description.get("encoding", "file"), description.get("isolated", True))
    for commit in table.commits():
        plan = read_plan(table.folder, commit.chunk)
        keys = plan["key"].to_pylist()
        if sum(file_name(key) in existing for key in keys) == commit.statuses.get(OK, 0):
            continue
        rows = read_parquet_file(table.part(commit.chunk)).to_pylist()
        reconstructions = {row["key"]: row["image"]["bytes"] for row in rows if row["image"]}
        reader = RowReader(plan_index(files, plan), decode=decode)
        for position, key in enumerate(keys):
            if key not in reconstructions or file_name(key) in existing:
                continue
            try:
                original = reader.square(position, square).transpose(1, 2, 0)
            except UndecodableImage as error:  # for example deleted since
                print(f"no {SIDE_BY_SIDE}/{file_name(key)}: {error}", file=sys.stderr)
                continue
            write_atomically(folder / file_name(key), _side_by_side(original, reconstructions[key]))


def _side_by_side(original: np.ndarray, reconstruction: bytes) -> bytes:
    right = np.asarray(Image.open(io.BytesIO(reconstruction)).convert("RGB"))
    file = io.BytesIO()
    Image.fromarray(np.hstack([original, right])).save(file, "PNG")
    return file.getvalue()
