"""Jobs over the images of a table: which rows, in which chunks, and how a chunk is read.

Recaption, reconstruct and precompute share this: a plan of chunks is written once into the output table, each
chunk is decoded on a CPU, passes through a model, and is committed (pipelines.execution.connection).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.cli.config import InputPlace, OutputPlace
from pipelines.execution.chunks import run_chunks
from pipelines.execution.cluster import WHOLE, Cluster, Step
from pipelines.execution.connection import PoolSize, RayConfig, bounds, check_resources, ray_session
from pipelines.execution.quarantine import FOLDER as DEATHS
from pipelines.execution.quarantine import Deaths, Survivor
from pipelines.execution.replan import plan_again, take_out
from pipelines.images.changes import changed_on_purpose, changes_of
from pipelines.images.listing import list_images
from pipelines.images.plans import LAYOUT, lay_out, planned, read_plan
from pipelines.images.random_access import RowReader, UndecodableImage, in_holdout, usable_rows
from pipelines.images.rows import OK, status
from pipelines.storage.files import place, remove_folder, stamp_of
from pipelines.storage.locks import exclusive
from pipelines.storage.tables import Table
from vlv_model.config import Config
from vlv_model.errors import DataError
from vlv_model.squares import Square

ROW_GROUP = 256  # rows, of tables without photographs
# What Ray counts for an actor on a CPU, and for a task that decodes or writes beside it.
_ACTOR_CPUS, _TASK_CPUS = 0.5, 0.25
_WAITING = 1_000_000  # keys in memory among which the smallest are sought


class Selection(Config):
    """Which images of a table a job works on, and where its own table goes."""

    input: InputPlace = Field(
        description="the images: a table that ingest wrote; Parquet with an image column (bytes, or "
        "Hugging Face's struct); .tar shards (WebDataset, img2dataset); a folder of image files"
    )
    image_column: str | None = Field(
        None, description="column of Parquet that has the images; default: the only one that can"
    )
    key_column: str | None = Field(
        None,
        description="column of Parquet that tells its rows apart (integers, or texts, which are "
        "hashed; of `url` the same keys as ingest's); default: `key`, or the place of the row",
    )
    where: str | None = Field(
        None,
        description="take only rows for which this SQL condition on columns of the input holds, as "
        "in \"aesthetic >= 6 and alt_text like '%dog%'\"",
    )
    output: OutputPlace = Field(description="folder of the table that is written")
    split: Literal["all", "train", "holdout"] = Field(
        "all", description="all images, or those that training used, or those held out from it"
    )
    holdout: float = Field(0.02, gt=0, lt=1, description="share held out: the same as in training")
    limit: int | None = Field(None, ge=1, description="at most this many images, by smallest key")
    rows_per_chunk: int = Field(
        256, ge=1, le=65_536, description="rows of a chunk, the unit that is committed"
    )

    def images(self, again: bool = False) -> tuple[list[Path], dict[str, Any]]:
        """The files of a table of the images, listed if need be (or `again`), and what they are
        known by.
        """
        asked = (self.input, self.image_column, self.key_column, self.where)
        return list_images(place(self.output), *asked, again=again)

    @property
    def is_ours(self) -> bool:
        """Whether the images lie in a table of ours, which lets in what was decoded once alone."""
        return Table(self.input).exists

    def chosen(
        self, files: Sequence[Path], among: np.ndarray | None = None
    ) -> Callable[[np.ndarray], np.ndarray]:
        """What tells which of the keys int64 `[n]` of these files are selected: bool `[n]`.

        `among` are the only keys that can be.
        """
        wanted = None if among is None else np.unique(among)

        def mask(keys: np.ndarray) -> np.ndarray:
            kept = np.ones(len(keys), bool)
            if self.split != "all":
                held = in_holdout(keys, self.holdout)
                kept &= held if self.split == "holdout" else ~held
            if wanted is not None:
                kept &= _occur(keys, wanted)
            return kept

        if self.limit is None:
            return mask
        keys = (rows["key"] for rows in usable_rows(files))
        last = _smallest(self.limit, (some[mask(some)] for some in keys))
        return lambda keys: mask(keys) & (keys <= last)


def _occur(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Which keys `[n]` occur among others, which are sorted: bool `[n]`."""
    if not len(among):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(among, keys), len(among) - 1)
    found: np.ndarray = among[at] == keys
    return found


def _smallest(count: int, batches: Iterable[np.ndarray], most_waiting: int = _WAITING) -> int:
    """The largest of the `count` smallest keys; of fewer, the largest of all.

    `most_waiting` keys beyond these are in memory.
    """
    kept, waiting, number = np.zeros(0, np.int64), [np.zeros(0, np.int64)], 0
    for keys in itertools.chain(batches, [None]):
        if keys is not None:
            waiting.append(keys)
            number += len(keys)
        if keys is None or number > count + most_waiting:
            kept, waiting, number = np.concatenate([kept, *waiting]), [], 0
            if len(kept) > count:
                kept = np.partition(kept, count - 1)[:count]
    return int(kept.max()) if len(kept) else 0


class ActorConfig(Config):
    """The actors that hold the model."""

    num_actors: PoolSize | None = Field(
        None,
        description="actors, each with its own copy of the model (on CPUs, one thread of work); "
        "[least, most]: more as long as there is work waiting and the cluster has, or starts, machines "
        "for them; default: one for each GPU that the Ray has, or for each core",
    )
    use_gpu: bool = Field(True, description="one CUDA GPU for each actor; false runs on CPUs")

    def count(self, config: RayConfig, cluster: Cluster) -> tuple[int, int]:
        """Fewest and most actors of a cluster: as asked for, or that can work at once."""
        if self.num_actors is not None:
            return bounds(self.num_actors)
        there = cluster.resources().get("GPU" if self.use_gpu else "CPU", 0)
        # A Ray of the job's own may be told of more CPUs than the machine has.
        most = there if self.use_gpu or config.cluster else min(there, os.cpu_count() or 1)
        return bounds(max(1, int(most)))


def open_table(
    kind: str,
    data: Selection,
    identity: Mapping[str, Any],
    columns: Collection[str] = (),
    among: Callable[[], np.ndarray] | None = None,
    **notes: Any,
) -> Table:
    """The job's output table with its plan: made anew, or the one that an earlier run began.

    An earlier one has to have the `columns`; a new one has no keys but those of `among`, and `notes`
    in its `_table.json`.
    What a takedown or an ingest has changed in the images since is planned again (pipelines.execution.replan).
    Raises RunError when the folder holds another run, DataError when nothing is selected.
    """
    table = Table(data.output)
    there = table.describe() if table.exists else {}
    changed = bool(there) and changed_on_purpose(data.input, there.get("changes"))
    images, listed = data.images(again=changed)
    stamp = stamp_of(images)

    def known(rows: int | None, layout: str | None) -> dict[str, Any]:
        return {
            "data.input": data.input,
            "data.image_column": data.image_column,
            "data.key_column": data.key_column,
            "data.where": data.where,
            "files": None,  # of a table of ours none are listed
            **listed,
            "data.split": data.split,
            "data.holdout": data.holdout if data.split != "all" else None,
            "data.limit": data.limit,
            "rows": rows,
            "layout": layout,
            "plan": LAYOUT,
            **identity,
        }

    if there:
        # Settings first: of other ones there may be no files to look at.
        same = known(*(there["identity"].get(name) for name in ("rows", "layout")))
        if changed and listed:  # rows of a table of ours
            same["files"] = there["identity"].get("files")
        table.check_free(kind, same, columns)
        if there.get("stamp") == stamp:
            # Nothing was written since it was planned: no key has to be looked at again.
            return table
    else:
        table.check_free(kind, {})
    # Of a table that is there the rows are only compared.
    write = None if there else (table.folder, data.rows_per_chunk)
    laid = lay_out(images, data.chosen(images, among and among()), write)
    if not laid.rows and changed:
        take_out(table, data.input)  # the rows of images that were taken down go all the same
    if not laid.rows and among is not None:
        raise DataError(f"no image of {data.input} is among those that are wanted")
    if not laid.rows:
        raise DataError(f"data.split={data.split} of {data.input} selects no image")
    whole = known(laid.rows, laid.layout)
    files = [str(file) for file in images]
    if changed:
        plan_again(
            table, data.input, images, data.chosen(images, among and among()), whole,
            data.rows_per_chunk, data.limit, bool(listed), files=files, stamp=stamp,
        )  # fmt: skip
        return table
    if table.check_free(kind, whole):
        return table
    chunks = -(-laid.rows // data.rows_per_chunk)
    notes |= {"planned_rows": laid.rows, "files": files, "stamp": stamp}
    notes |= {"changes": changes_of(data.input)}
    table.create(kind, whole, chunks, isolated=not data.is_ours, **notes)
    return table


class ReadImages:
    """First step of a chunk: its rows' keys and decoded squares.

    Takes a block of one row (`chunk`), gives `chunk`, `key`, `name` (of a file, or a URL), `pixels`
    (uint8 3·s·s, null where the image cannot be decoded), `status`, `error`; and where images are
    kept `image`, its bytes as they were read, null where they are no image. What does not lie in a
    table of ours is decoded in a process of its own (pipelines.pictures.squares).
    """

    def __init__(
        self,
        table: Table,
        square: Square,
        keep_images: bool = False,
        decode: Callable[[bytes, Square], np.ndarray] | None = None,
    ) -> None:
        """`decode` in place of the decoder that this process has in a child."""
        self.keep_images, self.decode = keep_images, decode
        self.folder = table.folder
        about = table.describe()
        self.files = [place(file) for file in about["files"]]
        self.isolated: bool = about.get("isolated", True)  # of earlier versions nothing is known
        self.square = square

    def __call__(self, block: pa.Table) -> pa.Table:
        from pipelines.pictures.squares import isolated_squares

        (chunk,) = block["chunk"].to_pylist()
        plan = read_plan(self.folder, chunk)
        decode = None
        if self.isolated:
            decode = self.decode or isolated_squares(self.square)
        reader = RowReader(planned(self.files, plan), named=True, decode=decode)
        names = reader.names()
        read: dict[int, _Read] = {}
        deaths = Deaths(self.folder / DEATHS / f"read-{chunk:06d}.json")
        for position in deaths.order(plan.num_rows):
            if deaths.is_deadly(position):
                why = f"the process died {deaths.alone[position]} times while it read this image"
                read[position] = _Read(status("decode", "crashed"), why)
                continue
            with deaths.working_on(position) if deaths.is_careful else nullcontext():
                read[position] = self._read(reader, position)
        deaths.end()
        rows = [read[position] for position in range(plan.num_rows)]
        images = {"image": pa.array([row.image for row in rows], pa.binary())}
        return pa.table(
            {
                "chunk": pa.array([chunk] * plan.num_rows, pa.int64()),
                "key": plan["key"],
                "name": pa.array(names, pa.string()),
                "pixels": pa.array([row.pixels for row in rows], pa.binary()),
                **(images if self.keep_images else {}),
                "status": pa.array([row.status for row in rows], pa.string()),
                "error": pa.array([row.error for row in rows], pa.string()),
            }
        )

    def _read(self, reader: RowReader, position: int) -> _Read:
        try:
            content = reader.row(position)["image"]
            pixels = reader.square(position, self.square, content)
        except UndecodableImage as error:
            return _Read(status("decode", error.kind), str(error)[:200])
        return _Read(OK, None, pixels.tobytes(), content if self.keep_images else None)


@dataclass(frozen=True)
class _Read:
    """What became of an image: its square, and its bytes where they are kept, or why it has none."""

    status: str
    error: str | None = None
    pixels: bytes | None = None
    image: bytes | None = None


def squares(pixels: pa.ChunkedArray, image_size: int) -> np.ndarray:
    """The `pixels` column, without nulls, as uint8 `[n 3 s s]`."""
    rows = [np.frombuffer(value, np.uint8) for value in pixels.to_pylist()]
    return np.stack(rows).reshape(-1, 3, image_size, image_size)


def run_actors(
    table: Table,
    square: Square,
    step: type,
    arguments: tuple[Any, ...],
    actors: ActorConfig,
    config: RayConfig,
    title: str,
    row_group: int = ROW_GROUP,
    keep_images: bool = False,
    sums: Mapping[str, str] | None = None,
) -> None:
    """Pass what `table` still lacks through a pool of actors of the class `step` (see Survivor).

    Images are decoded by tasks on any CPU of the cluster and stream to the actors, which hold the
    model, with their bytes where `keep_images`; a chunk is committed as soon as it is through, in
    row groups of `row_group` rows. `sums` are those of `run_chunks`. A finished table needs no Ray.
    """
    if not table.pending():
        return
    # Beside the actors decoding has to get a share, too, however few CPUs there are.
    device: dict[str, Any] = {"num_gpus": 1} if actors.use_gpu else {"num_cpus": _ACTOR_CPUS}
    if config.group:
        device["resources"] = config.pinned()

    with exclusive(table.folder, "data.output"), ray_session(config) as cluster:
        least, most = actors.count(config, cluster)
        needed = {"GPU": least} if actors.use_gpu else {"CPU": _ACTOR_CPUS * least}
        check_resources(config, cluster, needed, f"actors.num_actors={actors.num_actors or least}")

        def stages(chunks: Any, last: Step) -> Any:
            read = ReadImages(table, square, keep_images)
            decoded = chunks.map_batches(read, num_cpus=_TASK_CPUS, **WHOLE)
            pool = cluster.actors(least, most)
            held = (step, arguments, table.folder)
            made = decoded.map_batches(
                Survivor, fn_constructor_args=held, compute=pool, **device, **WHOLE
            )
            # Not by the actor, whose device would wait for the disk.
            return made.map_batches(last, num_cpus=_TASK_CPUS, **WHOLE)

        write = partial(table.write, row_group_size=row_group)
        total, done = table.describe()["planned_rows"], table.counts()
        run_chunks(cluster, table.pending(), stages, write, title, total, done, sums=sums)
        remove_folder(table.folder / DEATHS)
