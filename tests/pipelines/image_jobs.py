"""Image jobs whose models are of no interest: their plans, and runs of a step of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from pipelines.execution.connection import RayConfig
from pipelines.execution.image_job import ActorConfig, ImageJob
from pipelines.images.selection import Selection
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import Table
from vlv_model.squares import Square


def image_job(
    kind: str,
    data: Selection,
    identity: Mapping[str, Any],
    step: type = object,
    arguments: tuple[Any, ...] = (),
    actors: ActorConfig | None = None,
    columns: Collection[str] = (),
    among: Callable[[], np.ndarray] | None = None,
) -> ImageJob:
    """A job on squares of 32 pixels."""
    return ImageJob(
        kind=kind, data=data, identity=identity, square=Square(32), step=step, arguments=arguments,
        actors=actors or ActorConfig(use_gpu=False), ray=RayConfig(), title=f"{kind}s",
        columns=columns, among=among,
    )  # fmt: skip


def open_table(kind: str, data: Selection, identity: Mapping[str, Any], **more: Any) -> Table:
    """The table of an image job, as it is planned; nothing is run."""
    job, table = image_job(kind, data, identity, **more), Table(data.output)
    job.check(table)
    with lock_folder(table.folder, "data.output"):
        job.plan(table)
    return table
