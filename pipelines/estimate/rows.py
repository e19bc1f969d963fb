"""Counts the rows of a job's input from commits and footers: no image is read."""

from __future__ import annotations

from pipelines.images.selection import ImageInput, Selection
from pipelines.images.sources import find_source, is_image, walk
from pipelines.storage.files import as_path
from pipelines.storage.parquet import open_parquet
from pipelines.storage.tables import Table, parquet_files
from vlv_model.errors import VLVError


def count_rows(data: ImageInput, setting: str = "data.input") -> tuple[int | None, str]:
    """The number of images, and where it comes from; None with the reason if they are not there."""
    path, encoding = data.input, data.image_encoding
    try:
        if (table := Table(path)).exists:
            return table.counts().get("ok", 0), f"counted in {setting}"
        source = find_source(path, data.image_column, None, setting, encoding)
        if source.layout == "folder":
            found = (name for _, names in walk(as_path(path)) for name, _ in names)
            files = source.files or [name for name in found if is_image(name, encoding)]
            return len(files), f"files of {setting}"
        if source.layout == "tar":
            return None, f"{setting} has {len(source.files):,} shards: give estimate.rows"
        rows = 0
        for file in source.files or parquet_files(path, setting):
            with open_parquet(file) as parquet:
                rows += parquet.metadata.num_rows
        return rows, f"counted in {setting}"
    except (VLVError, OSError) as error:
        return None, f"not counted ({str(error).partition(': ')[0]})"


def selected_rows(data: Selection, given: int | None) -> tuple[int | None, str]:
    """The images that a job takes: `given`, or those of its input; `where` is not applied."""
    rows, origin = (given, "estimate.rows") if given else count_rows(data)
    if rows is None:
        if data.limit is not None:
            return data.limit, f"data.limit; {origin}"
        return None, origin
    if data.split != "all":
        share = data.holdout if data.split == "holdout" else 1 - data.holdout
        rows, origin = round(rows * share), f"{origin}, data.split={data.split}"
    if data.limit is not None and data.limit < rows:
        rows, origin = data.limit, f"data.limit, {origin}"
    if data.where is not None:
        origin += ", before data.where"
    return rows, origin
