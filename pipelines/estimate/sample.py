"""A dry run's sample picture of raw arrays: it shows whether channels and axes are right."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.images.external import ExternalImages
from pipelines.images.listed_rows import listed_rows
from pipelines.images.selection import ImageInput
from pipelines.images.sources import find_source
from pipelines.pictures.arrays import picture_of
from pipelines.pictures.decode import DecodeError
from vlv_model.errors import DataError, one_line

_PICTURES, _SIDE = 4, 384


def sample_lines(data: ImageInput) -> list[tuple[str, str]]:
    """The lines about the picture of a few arrays, which is written; none for image files."""
    if data.image_encoding == "file":
        return []
    try:
        squares, names = [], []
        for name, content in _first(data):
            picture = Image.fromarray(
                np.ascontiguousarray(picture_of(content, data.image_encoding))
            )
            squares.append(np.asarray(picture.resize((_SIDE, _SIDE))))
            names.append(f"{name} ({picture.width} x {picture.height})")
        if not squares:
            return [("sample", "data.input has no array among its first rows")]
    except (DecodeError, DataError, OSError) as error:
        return [("sample", f"the first array cannot be read: {one_line(error)}")]
    handle, file = tempfile.mkstemp(prefix="vlv-sample-", suffix=".png")
    with os.fdopen(handle, "wb") as stream:
        Image.fromarray(np.hstack(squares)).save(stream, "PNG")
    shown = f"{file} shows {', '.join(names)}: false colours or stripes mean another"
    return [("sample", f"{shown} data.image_encoding than {data.image_encoding}")]


def _first(data: ImageInput) -> list[tuple[str, bytes]]:
    """Names and bytes of the first images of the first file that has any."""
    source = find_source(
        data.input, data.image_column, data.key_column, encoding=data.image_encoding
    )
    for file in source.files or (None,):
        one = source if file is None else replace(source, files=(Path(file),))
        images = ExternalImages(source.column)
        found = []
        for table in islice(listed_rows(one, None, None, Counter()), 1):
            for row in table.slice(0, _PICTURES).to_pylist():
                if content := images.read(row):
                    found.append((row["name"], content))
        if found:
            return found
    return []
