"""Image jobs whose models are of no interest: their plans, and runs of a step of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.execution.connection import RayConfig
from pipelines.execution.image_job import ActorConfig, ImageJob
from pipelines.execution.steps import Chunk, ChunkByChunk
from pipelines.images.rows import status
from pipelines.images.selection import Selection
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import Table
from vlv_model.squares import Square


class Names(ChunkByChunk):
    """A step without a model."""

    failed = status("name", "failed")

    def __call__(self, chunk: Chunk) -> Chunk:
        return replace(chunk, rows=chunk.rows.select(["key", "name", "status", "error"]))


def image_job(
    kind: str,
    data: Selection,
    identity: Mapping[str, Any],
    step: type[Any] = object,
    arguments: tuple[Any, ...] = (),
    actors: ActorConfig | None = None,
    columns: Collection[str] = (),
    among: Callable[[], np.ndarray] | None = None,
    in_flight: int = 1,
) -> ImageJob:
    """A job on squares of 32 pixels."""
    return ImageJob(
        kind=kind, data=data, identity=identity, square=Square(32), step=step, arguments=arguments,
        actors=actors or ActorConfig(use_gpu=False), ray=RayConfig(), title=f"{kind}s",
        columns=columns, among=among, in_flight=in_flight,
    )  # fmt: skip


def open_table(kind: str, data: Selection, identity: Mapping[str, Any], **more: Any) -> Table:
    """The table of an image job, as it is planned; nothing is run."""
    job, table = image_job(kind, data, identity, **more), Table(data.output)
    job.check(table)
    with lock_folder(table.folder, "data.output"):
        job.plan(table)
    return table
