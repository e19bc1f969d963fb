"""The captions of a stage 2 run: joined to its images once, into <run_dir>/captions (caption_index).

A source that is changed later by a takedown or an ingest keeps the run's captions, but those of rows
that it lacks are removed, and their texts erased; what was added to it is ignored. A source that is
changed otherwise is another one, and the comparison of identities fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.images.changes import changed_on_purpose, changes_of, unexplained_keys
from pipelines.images.external import LOCATION_COLUMNS
from pipelines.images.random_access import RowIndex
from pipelines.images.sources import find_source
from pipelines.storage.locks import lock_folder
from pipelines.storage.parquet import read_schema
from pipelines.storage.tables import check_unused
from pipelines.training.caption_index import ABOUT, FOLDER, CaptionIndex, write_index
from pipelines.training.caption_join import ImageJoin
from pipelines.training.caption_sidecars import ListedSource, SidecarSource, find_sidecars
from pipelines.training.captions import CaptionSource, Join, Source
from pipelines.training.config import Stage2Config
from pipelines.training.run_folder import LEFTOVERS
from vlv_model.errors import DataError, RunError

_JOINS = {"stem": "name without suffix"}  # in words


@dataclass(frozen=True)
class RunCaptions:
    """The captions of a run, and the fields of its identity that they decide."""

    index: CaptionIndex
    identity: dict[str, Any]


def captions_of_run(config: Stage2Config, files: Sequence[Path], images: RowIndex) -> RunCaptions:
    """The captions of a run's images, which are joined if the run is new.

    `files` hold the images, `images` are their usable rows. Raises DataError for a missing column, a
    column of another type, a damaged file, and when no caption matches an image; RunError when the folder
    holds something else than a run, and when captions are missing that no takedown removed.
    """
    run_dir, sources = Path(config.run_dir), _sources(config, files)
    folder = run_dir / FOLDER
    described = [source.describe() for source in sources] if config.data.captions else None
    if not (folder / ABOUT).is_file():
        if not (run_dir / "run.json").is_file():
            check_unused(run_dir, LEFTOVERS, "run", "run_dir")
        with lock_folder(run_dir, "run_dir"):
            if not (folder / ABOUT).is_file():  # another job may have just written it
                _write(folder, config, files, images, sources, described)
    index = CaptionIndex.open(folder)
    about = index.about()
    gone, explained = _removed(index, about, sources, described, files, images)
    if explained:
        described = about["sources"]
    gone = np.union1d(gone, index.without(images.keys))
    return RunCaptions(index.remove(gone), {"data.captions": described})


def _sources(config: Stage2Config, files: Sequence[Path]) -> list[Source]:
    data = config.data
    if data.captions is None:
        return [_source_of_images(data.input, tuple(files), data.column_of(0))]
    columns = map(data.column_of, range(len(data.captions)))
    return [
        find_sidecars(path, column) or CaptionSource.find(path, column, data.join_on)
        for path, column in zip(data.captions, columns, strict=True)
    ]


def _source_of_images(path: str, files: tuple[Path, ...], column: str) -> Source:
    """The captions that lie with the images; `files` are their table or their listing."""
    if not set(LOCATION_COLUMNS) <= set(read_schema(files[0]).names):
        return CaptionSource(path, files, column, "key")
    source = find_source(path)
    if source.layout in ("table", "parquet"):
        return ListedSource(path, files, column)
    shards = source.files if source.layout == "tar" else ()
    return SidecarSource(path, source.root, shards, column)


def _write(
    folder: Path,
    config: Stage2Config,
    files: Sequence[Path],
    images: RowIndex,
    sources: Sequence[Source],
    described: list[str] | None,
) -> None:
    joins: dict[Join, ImageJoin] = {}
    for source in sources:
        if source.join_on not in joins:
            joins[source.join_on] = ImageJoin(source.join_on, files, images.keys)

    def notes(counts: Counter[str]) -> dict[str, Any]:
        if not counts["images"]:
            raise _no_match(config, sources, counts)
        counts["images_without_caption"] = len(images) - counts["images"]
        print(_in_words(counts), file=sys.stderr)
        changes = [changes_of(source.path) for source in sources]
        return {"counts": dict(counts), "sources": described, "changes": changes}

    print("joining captions to images …", file=sys.stderr, flush=True)
    batches = [(joins[source.join_on], source.batches) for source in sources]
    size = sum(source.size(len(images)) for source in sources)
    write_index(folder, batches, size, notes)


def _no_match(config: Stage2Config, sources: Sequence[Source], counts: Counter[str]) -> DataError:
    if config.data.captions is None:
        return DataError(
            f"data.input={config.data.input} holds no row of status 'ok' with a "
            f"{config.data.column_of(0)} (data.caption_column): give data.captions"
        )
    found = counts["captions_without_image"] + counts["ambiguous_names"]
    joined = " and ".join(sorted({_JOINS.get(s.join_on, s.join_on) for s in sources}))
    return DataError(
        f"none of the {found} captions of {', '.join(config.data.captions)} matches an image of "
        f"{config.data.input}: they were joined by {joined} (data.join_on)"
    )


def _in_words(counts: Counter[str]) -> str:
    several = counts["images_with_several_captions"]
    parts = [
        f"{counts['captions']:,} captions of {counts['images']:,} images"
        + (f" ({several:,} have several)" if several else ""),
        f"{counts['images_without_caption']:,} images without a caption",
    ]
    words = {
        "captions_without_image": "captions without an image",
        "ambiguous_names": "captions whose file name several images have (give their paths)",
        "blank_captions": "blank captions",
        "captions_cleaned": "captions whose control characters were removed",
        "captions_cut": "captions that were cut",
    }
    return "; ".join(
        [*parts, *(f"{counts[name]:,} {text}" for name, text in words.items() if counts[name])]
    )


def _removed(
    index: CaptionIndex,
    about: dict[str, Any],
    sources: Sequence[Source],
    described: list[str] | None,
    files: Sequence[Path],
    images: RowIndex,
) -> tuple[np.ndarray, bool]:
    """Keys, int64 `[n]`, whose captions the changed sources lack, and whether takedowns or ingests
    explain all changes of the sources.
    """
    nothing = np.zeros(0, np.int64)
    recorded = about["sources"]
    if described is None or recorded is None or len(recorded) != len(described):
        return nothing, False
    changed = [number for number, one in enumerate(described) if one != recorded[number]]
    for number in changed:
        if not changed_on_purpose(sources[number].path, about["changes"][number]):
            return nothing, False
    gone = [nothing]
    for number in changed:
        source = sources[number]
        join = ImageJoin(source.join_on, files, images.keys)
        batches = source.batches(Counter())
        present = [np.unique(join.find(batch["value"])[1]) for batch in batches]
        before = np.unique(index.keys[index.sources == number])
        missing = np.setdiff1d(before, np.concatenate([nothing, *present]))
        # Images that were removed are explained by their own table.
        missing = missing[np.isin(missing, images.keys) & index.has(missing)]
        if len(lost := unexplained_keys(source.path, missing)):
            raise RunError(
                f"the run began with captions of {len(lost):,} images that {source.path} lacks now, and "
                f"no takedown or ingest has removed them (the first is of key {lost[0]}): restore them, "
                "or choose another run_dir"
            )
        gone.append(missing)
    return np.concatenate(gone), True
