"""Samples of a run as files, small enough that a report shows many steps of them.

<run_dir>/samples/step-00001000.parquet   a row per image, pictures of at most 256 pixels
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.execution.model import checkpoint_name
from pipelines.images.rows import OK
from pipelines.report.gallery import GalleryItem
from pipelines.storage.parquet import read_parquet_file, write_parquet

FOLDER = "samples"
_SIDE = 256  # pixels
_ROW = pa.schema(
    [
        ("key", pa.int64()),
        ("original", pa.binary()),
        ("reconstruction", pa.binary()),
        ("caption", pa.string()),
        ("target", pa.string()),
    ]
)


def write_samples(run_dir: Path, step: int, items: Sequence[GalleryItem]) -> None:
    """Write the samples of a step; their pictures become smaller JPEGs if they are large."""
    rows = [
        {
            "key": item.key,
            "original": _small(item.original),
            "reconstruction": item.reconstruction and _small(item.reconstruction),
            "caption": item.caption,
            "target": item.target,
        }
        for item in items
    ]
    write_parquet(_file(run_dir, step), pa.Table.from_pylist(rows, _ROW))


def read_samples(run_dir: Path, most: int) -> dict[int, list[GalleryItem]]:
    """Samples by step: of the first and the last step that has some, and of `most` - 2 between."""
    steps = sorted(_step(file) for file in (run_dir / FOLDER).glob("step-*.parquet"))
    places = np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)
    return {
        steps[place]: [
            GalleryItem(**row, status=OK)
            for row in read_parquet_file(_file(run_dir, steps[place])).to_pylist()
        ]
        for place in places.tolist()
    }


def _file(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"{checkpoint_name(step)}.parquet"


def _step(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))


def _small(content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content))
    if max(image.size) <= _SIDE:
        return content
    image.thumbnail((_SIDE, _SIDE))
    smaller = io.BytesIO()
    image.convert("RGB").save(smaller, "JPEG", quality=85)
    return smaller.getvalue()
