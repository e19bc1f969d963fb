"""The ingest job: metadata -> plan -> download -> decode -> image table.

The plan is written once; then its chunks stream through Ray Data, each one block all the way:

    chunk -> read_plan -> Downloader            actors: an event loop and a connection pool each
                              |  bytes
                              v
                          store_images          tasks on all CPUs: decode, resize, encode
                              |  IMAGE_ROW
                              v
                          part + commit         (pipelines/runtime.py)

A killed job continues with the chunks that have no commit; see pipelines/storage.py.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipelines.config import InputPlace, OutputPlace, dump
from pipelines.ingest.download import DownloadConfig, Downloader
from pipelines.ingest.encode import ImageConfig
from pipelines.ingest.filters import FilterConfig
from pipelines.ingest.isolation import decoder
from pipelines.ingest.metadata import fingerprint, input_files
from pipelines.ingest.plan import chunk_file, write_plan
from pipelines.places import place, read_parquet_file
from pipelines.runtime import RayConfig, ray_session, run_chunks
from pipelines.schemas import IMAGE_ROW, OK, with_image_feature
from pipelines.storage import IMAGE_ROW_GROUP, Table
from vlv_model.config import Config

KIND = "image"

_CPUS_PER_DOWNLOADER = 4  # of the cluster
# Chunks that one downloader works on at a time: while a chunk waits for its slowest host, the
# connections serve the others.
_CHUNKS_PER_DOWNLOADER = 4


class IngestData(Config):
    """What is read, and where the table goes."""

    input: InputPlace = Field(
        description="list of URLs: a Parquet, CSV, TSV or JSONL file, a folder of them, or a glob"
    )
    output: OutputPlace = Field(description="folder of the image table")
    columns: dict[str, str] = Field(
        {}, description="spellings of columns that are not known: {their name: our name}"
    )


class IngestConfig(Config):
    """All settings of the ingest job."""

    data: IngestData
    filter: FilterConfig = FilterConfig()
    download: DownloadConfig = DownloadConfig()
    image: ImageConfig = ImageConfig()
    rows_per_chunk: int = Field(
        256, ge=1, description="rows that are downloaded, decoded and committed together"
    )
    ray: RayConfig = RayConfig()

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is in the table; others may change between reruns."""
        values = dump(self)
        return {
            "data.input": fingerprint(input_files(self.data.input)),
            "data.columns": values["data"]["columns"],
            **{f"filter.{name}": value for name, value in values["filter"].items()},
            **{
                f"image.{name}": value
                for name, value in values["image"].items()
                if name != "decode_timeout"
            },
            "download.max_bytes": self.download.max_bytes,
            "download.respect_optout": self.download.respect_optout,
            "rows_per_chunk": self.rows_per_chunk,
        }


def ingest(config: IngestConfig) -> dict[str, int]:
    """Make the image table of a list of URLs, or what is missing of it; rows by status.

    Every row of the plan becomes one row of IMAGE_ROW: `ok`, `download:…`, `decode:…`, or
    `filtered:…` by the image's own size. Rows that the metadata rule out, and repeated URLs, are
    counted by rule in `_table.json` under `dropped`. Raises DataError for an unusable list and
    RunError where `data.output` holds another run.
    """
    table = Table(config.data.output)
    identity = config.identity()
    if not table.check_free(KIND, identity):
        plan = write_plan(
            input_files(config.data.input),
            table.folder,
            config.filter,
            config.data.columns,
            config.rows_per_chunk,
        )
        table.create(
            KIND,
            identity,
            plan.chunks,
            planned_rows=plan.rows,
            read=plan.read,
            dropped=plan.dropped,
        )
    if config.download.allow_private:
        print(
            "warning: download.allow_private=true: URLs may reach this machine and its network",
            file=sys.stderr,
        )
    if table.pending():
        with ray_session(config.ray):
            stages, rows = partial(_stages, config=config), table.describe()["planned_rows"]
            run_chunks(table, stages, "ingest", rows, row_group_size=IMAGE_ROW_GROUP)
    return table.counts()


def _stages(chunks: Any, config: IngestConfig) -> Any:
    """The dataset of IMAGE_ROW rows (and their `chunk`) of a dataset of chunk numbers."""
    import ray

    cpus = ray.cluster_resources().get("CPU", 1)
    downloaders = ray.data.ActorPoolStrategy(
        size=max(1, int(cpus // _CPUS_PER_DOWNLOADER)),
        max_concurrent_calls_per_actor=_CHUNKS_PER_DOWNLOADER,
        max_tasks_in_flight_per_actor=_CHUNKS_PER_DOWNLOADER + 1,
        enable_true_multi_threading=True,
    )
    whole_blocks: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    planned = chunks.map_batches(
        partial(read_plan, folder=place(config.data.output)), num_cpus=0, **whole_blocks
    )
    downloaded = planned.map_batches(
        Downloader,
        fn_constructor_args=(config.download,),
        compute=downloaders,
        num_cpus=0,  # it mostly waits: every CPU is left to decoding
        **whole_blocks,
    )
    store = partial(store_images, image=config.image, filters=config.filter)
    return downloaded.map_batches(store, **whole_blocks)


def read_plan(chunks: pa.Table, folder: Path) -> pa.Table:
    """The planned METADATA_ROW rows of one chunk, with its number."""
    (chunk,) = chunks["chunk"].to_pylist()
    rows = read_parquet_file(chunk_file(folder, chunk))
    return rows.append_column("chunk", pa.array([chunk] * rows.num_rows, pa.int64()))


def store_images(rows: pa.Table, image: ImageConfig, filters: FilterConfig) -> pa.Table:
    """Downloaded rows (`data`, `status`, `error`) as IMAGE_ROW rows, with their `chunk`."""
    decode = decoder(image, filters)
    made = []
    for data, state, error in zip(
        rows["data"], rows["status"].to_pylist(), rows["error"].to_pylist(), strict=True
    ):
        if state == OK:  # one body at a time is copied out of the block
            made.append(decode(data.as_py()))
        else:
            made.append({"status": state, "error": error})
    columns = [
        rows[field.name]
        if field.name in rows.column_names and field.name not in ("status", "error")
        else pa.array([row.get(field.name) for row in made], field.type)
        for field in IMAGE_ROW
    ]
    table = pa.table(columns, schema=with_image_feature(IMAGE_ROW))
    return table.append_column("chunk", rows["chunk"])
