"""Jobs over the images of a table: a plan of chunks; each is decoded, passed through a model and committed.

Recaption, reconstruct and precompute are such jobs; the frame is that of all tables
(pipelines.execution.table_job).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from pipelines.execution.chunks import run_chunks
from pipelines.execution.cluster import Cluster
from pipelines.execution.connection import PoolSize, RayConfig, bounds, check_resources
from pipelines.execution.quarantine import FOLDER as ATTEMPTS
from pipelines.execution.quarantine import GuardedStep, record_of
from pipelines.execution.read_images import ReadImages
from pipelines.execution.replan import plan_again, take_out
from pipelines.execution.steps import Chunk, ModelStep, PlacedStep
from pipelines.execution.table_job import TableJob
from pipelines.images.changes import changed_on_purpose, changes_of
from pipelines.images.plans import LAYOUT, make_plan
from pipelines.images.selection import Selection
from pipelines.storage.files import remove_file
from pipelines.storage.fingerprints import mtime_fingerprint
from pipelines.storage.folders import remove_folder
from pipelines.storage.tables import Table
from vlv_model.config import Config
from vlv_model.errors import DataError
from vlv_model.squares import Square

ROW_GROUP = 256  # rows, of tables without photographs
# What Ray counts for an actor on a CPU, and for a task that decodes or writes beside it.
_ACTOR_CPUS, _TASK_CPUS = 0.5, 0.25


class ActorConfig(Config):
    """The actors that hold the model."""

    num_actors: PoolSize | None = Field(
        None,
        description="actors, each with its own copy of the model (on CPUs, one thread of work); "
        "[least, most]: more as long as there is work waiting and the cluster has, or starts, machines "
        "for them; default: one for each GPU that the Ray has, or for each core",
    )
    use_gpu: bool | None = Field(
        None,
        description="one CUDA GPU for each actor; false runs on CPUs; default: true on a cluster, and on "
        "a machine that has a GPU",
    )

    def on(self, ray: RayConfig) -> ActorConfig:
        """These settings with the default of `use_gpu` decided. Raises what `RayConfig.uses_gpu` does."""
        return self.model_copy(update={"use_gpu": ray.uses_gpu(self.use_gpu, "actors.use_gpu")})

    def count(self, config: RayConfig, cluster: Cluster) -> tuple[int, int]:
        """Fewest and most actors of a cluster: as asked for, or that can work at once."""
        if self.num_actors is not None:
            return bounds(self.num_actors)
        there = cluster.resources().get("GPU" if self.use_gpu else "CPU", 0)
        # A Ray of the job's own may be told of more CPUs than the machine has.
        most = there if self.use_gpu or config.cluster else min(there, os.cpu_count() or 1)
        return bounds(max(1, int(most)))


@dataclass(frozen=True)
class ImageJob(TableJob):
    """A job that makes one row of each selected image."""

    kind: str  # of the table
    data: Selection
    identity: Mapping[str, Any]  # settings that make a row what it is
    square: Square  # that the model takes
    step: Callable[..., ModelStep]  # called with `arguments` in each actor
    arguments: tuple[Any, ...]
    actors: ActorConfig
    ray: RayConfig
    title: str
    row_group: int = ROW_GROUP  # rows
    in_flight: int = 1  # chunks that a step takes at once
    keep_images: bool = False  # the images' bytes go on to the actors
    columns: Collection[str] = ()  # that a table of an earlier version has to have
    among: Callable[[], np.ndarray] | None = None  # the only keys that are selected
    sums: Mapping[str, str] = field(default_factory=dict)  # those of `run_chunks`
    notes: Mapping[str, Any] = field(default_factory=dict)  # of a new table

    def check(self, table: Table) -> None:
        table.check_same_run(self.kind, None)

    def plan(self, table: Table) -> None:
        """Make a plan, or continue with that of an earlier attempt.

        Images that a takedown or an ingest has changed since are planned again
        (pipelines.execution.replan). Raises RunError if the folder holds another run, DataError if no
        image is selected.
        """
        data = self.data
        recorded = table.describe() if table.exists else {}
        changed = bool(recorded) and changed_on_purpose(data.input, recorded.get("changes"))
        changes = changes_of(data.input)  # before its rows: a later takedown is a change
        images, listed = data.images(again=changed)
        stamp = mtime_fingerprint(images)
        if recorded:
            # Settings first: with other ones there may be no files to compare.
            before = recorded["identity"]
            same = self._identity(listed, before.get("rows"), before.get("layout"))
            if changed and listed:  # `where` on a changed table: its files are others by now
                same["files"] = before.get("files")
            table.check_same_run(self.kind, same, self.columns)
            if recorded.get("stamp") == stamp:
                return  # the input is as it was planned: no key needs to be read
        # The plan of an existing table is compared, not written.
        write = None if recorded else (table.folder, data.rows_per_chunk)
        chosen = partial(data.chosen, images, self.among and self.among())
        plan = make_plan(images, chosen(), write, data.usable_rows)
        if not plan.rows and changed:
            take_out(table, data.input)  # removed rows go, even though the job then fails
        if not plan.rows:
            raise DataError(self._no_image())
        identity = self._identity(listed, plan.rows, plan.layout)
        files = [str(file) for file in images]
        if changed:
            plan_again(
                table, data.input, images, chosen(), identity, data.rows_per_chunk, data.limit,
                bool(listed), data.usable_rows, files=files, stamp=stamp, changes=changes,
            )  # fmt: skip
        elif not table.check_same_run(self.kind, identity):
            chunks = -(-plan.rows // data.rows_per_chunk)
            notes = {"planned_rows": plan.rows, "files": files, "stamp": stamp, **self.notes}
            notes |= {"changes": changes, "isolated": not data.is_own_table}
            notes |= {"encoding": data.image_encoding}
            table.create(self.kind, identity, chunks, **notes)

    def _identity(
        self, listed: Mapping[str, Any], rows: int | None, layout: str | None
    ) -> dict[str, Any]:
        """The identity of the table: its images, and what is made of them."""
        data = self.data
        return {
            "data.input": data.input,
            "data.image_column": data.image_column,
            "data.key_column": data.key_column,
            "data.image_encoding": data.image_encoding,
            "data.where": data.where,
            **({"data.features": list(data.features)} if data.features else {}),
            "files": None,  # our own tables are not listed
            **listed,
            "data.split": data.split,
            "data.holdout": data.holdout if data.split != "all" else None,
            "data.limit": data.limit,
            "rows": rows,
            "layout": layout,
            "plan": LAYOUT,
            **self.identity,
        }

    def _no_image(self) -> str:
        if self.among is not None:
            return f"no image of {self.data.input} is among those that are wanted"
        return f"data.split={self.data.split} of {self.data.input} selects no image"

    def run(self, table: Table, cluster: Cluster) -> None:
        """Pass what the table still lacks through a pool of actors.

        Images are decoded by tasks on any CPU of the cluster and stream to the actors, which hold the
        model; a chunk is committed as soon as it is through.
        """
        if not table.pending():
            return
        # Leave CPUs for decoding beside the actors, even on a small machine.
        device: dict[str, Any] = {"num_cpus": _ACTOR_CPUS}
        if self.actors.use_gpu:
            device = {"num_gpus": 1}
        if self.ray.group:
            device["resources"] = self.ray.pinned()
        least, most = self.actors.count(self.ray, cluster)
        needed = {"GPU": least} if self.actors.use_gpu else {"CPU": _ACTOR_CPUS * least}
        asked = f"actors.num_actors={self.actors.num_actors or least}"
        check_resources(self.ray, cluster, needed, asked)

        on_cpu = {"num_cpus": _TASK_CPUS}
        read = self.reader(table)
        model = PlacedStep(
            GuardedStep,
            (self.step, self.arguments, table.folder),
            resources=device,
            actors=(least, most),
            in_flight=self.in_flight,
        )
        run_chunks(
            cluster,
            table.pending(),
            [PlacedStep(read, resources=on_cpu), model],
            partial(_commit, table=table, row_group=self.row_group),
            self.title,
            table.describe()["planned_rows"],
            done=table.counts(),
            sums=self.sums,
            start=f"{self.title}: loading the model, then the first rows",
            commit_apart=on_cpu,  # in the actor, its device would wait for the disk
        )
        remove_folder(table.folder / ATTEMPTS)

    def reader(self, table: Table) -> Callable[[Chunk], Chunk]:
        """The first step of a chunk, which reads its rows."""
        return ReadImages(table, self.square, self.keep_images)


def _commit(chunk: Chunk, table: Table, row_group: int) -> None:
    table.write(chunk.number, chunk.rows, row_group_size=row_group)
    remove_file(record_of(table.folder, chunk.number))
