"""The images, captions and pictures of a comparison's largest differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluate.comparing import Comparison
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.subjects import Subject
from pipelines.images.rows import require_columns
from pipelines.pictures.arrays import png_of
from pipelines.pictures.decode import DecodeError
from pipelines.storage.files import as_path
from pipelines.storage.parquet import open_parquet
from pipelines.storage.tables import Table, parquet_files
from vlv_model.errors import VLVError


@dataclass(frozen=True)
class Shown:
    """An image with what each of two subjects made of it."""

    key: int
    original: bytes | None
    captions: tuple[str | None, str | None]
    pictures: tuple[bytes | None, bytes | None]
    values: tuple[float, float]


@dataclass(frozen=True)
class Extremes:
    """The largest differences of one comparison, either way."""

    comparison: Comparison
    second_better: Sequence[Shown]
    first_better: Sequence[Shown]


def gallery_of(
    comparisons: Sequence[Comparison], subjects: Sequence[Subject], config: EvaluateConfig
) -> list[Extremes]:
    """The first comparison by images of each pair of subjects."""
    chosen: dict[tuple[str, str], Comparison] = {}
    for comparison in (c for c in comparisons if c.of_images):
        chosen.setdefault((comparison.first, comparison.second), comparison)
    if not config.gallery:
        return []
    by_name = {subject.name: subject for subject in subjects}
    found = []
    for comparison in chosen.values():
        pair = by_name[comparison.first], by_name[comparison.second]
        up, down = comparison.extremes(config.gallery)
        keys = [int(comparison.keys[i]) for i in (*up, *down)]
        originals = _originals(keys, pair, config.data.images)
        captions = [_first(table.captions for table in one.captions.values()) for one in pair]
        pictures = [
            images_of(parquet_files(path), keys) if path else {}
            for path in (next(iter(one.pictures.values()), None) for one in pair)
        ]

        def shown(
            i: int,
            comparison: Comparison = comparison,
            originals: dict[int, bytes] = originals,
            captions: list[Any] = captions,
            pictures: list[dict[int, bytes]] = pictures,
        ) -> Shown:
            key = int(comparison.keys[i])
            return Shown(
                key,
                originals.get(key),
                (captions[0].get(key), captions[1].get(key)),
                (pictures[0].get(key), pictures[1].get(key)),
                (float(comparison.first_values[i]), float(comparison.second_values[i])),
            )

        found.append(Extremes(comparison, [shown(i) for i in up], [shown(i) for i in down]))
    return found


def images_of(
    files: Sequence[Path], keys: Iterable[int], encoding: Any = "file"
) -> dict[int, bytes]:
    """The encoded images of some keys; only row groups that hold one are read.

    Keys without an image are left out. Raises DataError without the columns `key` and `image`.
    """
    wanted = np.array(sorted(set(keys)), np.int64)
    found: dict[int, bytes] = {}
    for file in files:
        if len(found) == len(wanted):
            break
        with open_parquet(file) as parquet:
            require_columns(parquet.schema_arrow, ["key", "image"], str(file))
            for group in range(parquet.num_row_groups):
                here = parquet.read_row_group(group, columns=["key"])["key"].to_numpy()
                if not np.isin(here, wanted).any():
                    continue
                rows = parquet.read_row_group(group, columns=["key", "image"])
                rows = rows.filter(np.isin(rows["key"].to_numpy(), wanted))
                for row in rows.to_pylist():
                    content = row["image"]
                    content = content["bytes"] if isinstance(content, dict) else content
                    if not content:
                        continue
                    try:
                        shown = content if encoding == "file" else png_of(content, encoding)
                    except DecodeError:
                        continue
                    found.setdefault(row["key"], shown)
    return found


def _originals(
    keys: Sequence[int], pair: Sequence[Subject], images: str | None
) -> dict[int, bytes]:
    if images is not None:
        return images_of(parquet_files(images, "data.images"), keys)
    for subject in pair:
        for captions in subject.captions.values():
            table = Table(captions.path)
            described = table.describe() if table.exists else {}
            files = [as_path(file) for file in described.get("files", [])]
            try:  # files of another layout, or moved since
                if files:
                    return images_of(files, keys, described.get("encoding", "file"))
            except VLVError:
                continue
    return {}


def _first(captions: Iterable[dict[int, str]]) -> dict[int, str]:
    return next(iter(captions), {})
