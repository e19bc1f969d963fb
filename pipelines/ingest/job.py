"""The ingest job: metadata -> plan -> download -> decode -> image table.

A run is planned once (plan.py); then its chunks stream through Ray Data, each one block all the
way:

    chunk -> ReadPlan -> ImageFetcher           connections and decoders, see fetch.py
                             |  IMAGE_ROW
                             v
                         Merge: with the part that is there -> part + commit

All of a chunk happens in one actor, so no picture passes through Ray's object store. A killed job
continues with the chunks that its run has not committed; see runs.py and storage.py.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from pipelines.cli.config import InputPlace, OutputPlace, dump
from pipelines.execution.chunks import run_chunks
from pipelines.execution.cluster import WHOLE, Cluster, Step
from pipelines.execution.connection import RayConfig, ray_session
from pipelines.images.blocklist import Blocked
from pipelines.images.rows import DECODE, DOWNLOAD, IMAGE_ROW, status, with_image_feature
from pipelines.images.runs import FOLDER, Run, last_run, next_run
from pipelines.ingest.account import Throughput, write_link_rot
from pipelines.ingest.duplicates import DuplicateConfig, mark_duplicates
from pipelines.ingest.estimate import estimate, rows_per_file
from pipelines.ingest.fetch import ImageFetcher, fetchers_of
from pipelines.ingest.known_rows import CARRIED, KnownKeys, with_marks
from pipelines.ingest.plan import CHUNKS_FILE, Plan, chunk_file, first_plan, next_plan, read_list
from pipelines.ingest.report import REPORT, write_report
from pipelines.ingest.web.answers import FAILURE_CLASSES, TRANSIENT
from pipelines.ingest.web.config import PER_CPU, DownloadConfig, share_of
from pipelines.ingest.web.machine import requests_that_fit, warn_of_proxies
from pipelines.lists.files import fingerprint, input_files
from pipelines.lists.filters import FilterConfig
from pipelines.pictures import decode
from pipelines.pictures.encode import ImageConfig
from pipelines.storage.files import (
    is_file,
    is_folder,
    open_parquet,
    read_parquet_file,
    remove_folder,
    write_atomically,
)
from pipelines.storage.locks import exclusive
from pipelines.storage.tables import IMAGE_ROW_GROUP, Table
from vlv_model.config import Config
from vlv_model.errors import RunError

KIND = "image"

# What may be retried, by the name that a user gives, and the statuses that it stands for.
_RETRIED = {
    **{name: [status(DOWNLOAD, name)] for name in FAILURE_CLASSES},
    **{f"{DECODE}:{name}": [status(DECODE, name)] for name in decode.FAILURE_CLASSES},
    "transient": sorted(status(DOWNLOAD, name) for name in TRANSIENT),
}

# Rows that one fetcher works on at a time: while a chunk waits for its slowest host, connections
# and decoders serve the others.
_ROWS_IN_WORK = 4096
_CHUNKS_IN_WORK = (2, 16)

# A part is in memory several times while it is written. A retry of few rows in many chunks would
# otherwise have as many parts there as chunks are in work.
_writing = threading.BoundedSemaphore(2)


class IngestData(Config):
    """What is read, and where the table goes."""

    input: InputPlace = Field(
        description="list of URLs: a Parquet, CSV, TSV or JSONL file, a folder of them, or a glob"
    )
    output: OutputPlace = Field(description="folder of the image table")
    columns: dict[str, str | None] = Field(
        {},
        description="spellings of columns that are not known: {their name: our name}; "
        "{their name: none} leaves a column out",
    )


class IngestConfig(Config):
    """All settings of the ingest job."""

    data: IngestData
    filter: FilterConfig = FilterConfig()
    download: DownloadConfig = DownloadConfig()
    image: ImageConfig = ImageConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    retry: tuple[str, ...] = Field(
        (),
        description="classes of failed rows of the table that are tried again, such as "
        "timeout,http_5xx; transient: those that another attempt may mend",
    )
    dry_run: bool = Field(
        False, description="only say what would be dropped, fetched and marked, and what it takes"
    )
    rows_per_chunk: int | None = Field(
        None,
        ge=1,
        description="rows that are committed together, as one file; default: files of 64 MB, of a "
        "short list smaller ones",
    )
    ray: RayConfig = RayConfig()

    @field_validator("retry")
    @classmethod
    def _known_classes(cls, retry: tuple[str, ...]) -> tuple[str, ...]:
        for name in retry:
            if name not in _RETRIED:
                raise ValueError(f"'{name}': expected some of {', '.join(_RETRIED)}")
        return retry

    def identity(self) -> dict[str, Any]:
        """The settings that every run of a table shares: how an image is stored."""
        values = dump(self)["image"]
        return {f"image.{name}": v for name, v in values.items() if name != "decode_timeout"}

    def run_settings(self, files: list[Path]) -> dict[str, Any]:
        """The settings that tell one run of the list `files` from the next; how fast it is done is
        no part of them."""
        values = dump(self)
        return {
            "data.input": fingerprint(files),
            "data.columns": values["data"]["columns"],
            "retry": values["retry"],
            **{f"filter.{name}": value for name, value in values["filter"].items()},
            **{f"duplicates.{name}": value for name, value in values["duplicates"].items()},
            "download.max_bytes": self.download.max_bytes,
            "download.respect_optout": self.download.respect_optout,
        }

    def retried(self) -> frozenset[str]:
        """The statuses behind `retry`."""
        return frozenset(state for name in self.retry for state in _RETRIED[name])


def ingest(config: IngestConfig) -> dict[str, int]:
    """Make the image table of a list of URLs, or what is missing of it; rows by status.

    Every row of the list becomes one row of IMAGE_ROW: `ok`, `download:…`, `decode:…`, or
    `filtered:…` by the image's own size. Rows that the metadata rule out, and repeated URLs, are
    counted by rule in the run's `run.json`. Into a table that is there only new rows are fetched,
    and failed ones whose class `retry` names; rows that the filters now rule out are marked, and what
    the list says anew of a known URL (texts, scores, licences) is taken without a download.
    Raises DataError for an unusable list and RunError where `data.output` holds something else,
    or images that are stored otherwise.
    """
    table = Table(config.data.output)
    table.check_free(KIND, config.identity(), IMAGE_ROW.names)
    with exclusive(table.folder, "data.output"):
        run = _open_run(config, table)
        warn_of_proxies()
        requests_that_fit(
            config.download.concurrency or PER_CPU
        )  # a fetcher's warning is not shown
        if config.download.allow_private:
            print(
                "warning: download.allow_private=true: URLs may reach this machine and its network",
                file=sys.stderr,
            )
        worked = not run.is_finished
        if worked:
            with ray_session(config.ray) as cluster:
                _work(cluster, config, table, run)
        counts = table.counts()
        run.end(counts)
        if worked or not is_file(table.folder / REPORT):
            write_report(table)
    return counts


def plan_only(config: IngestConfig) -> Plan:
    """What a run would do to the table, which stays as it is."""
    table, plan = Table(config.data.output), Plan()
    if is_folder(table.folder):
        table.check_free(KIND, config.identity(), IMAGE_ROW.names)
    with tempfile.TemporaryDirectory(prefix="vlv-plan-") as folder:
        _plan_into(Path(folder), input_files(config.data.input), config, table, plan)
    return plan


def _plan_into(
    folder: Path, files: list[Path], config: IngestConfig, table: Table, plan: Plan
) -> bytes | None:
    """Write the plan of a run into `folder`; of a first run, CHUNKS_FILE's content."""
    known = KnownKeys(table) if table.exists else None
    blocked = Blocked.read(table)
    rows = read_list(files, config.filter, config.data.columns, plan, blocked, known=known)

    def size(listed: int) -> int:
        return config.rows_per_chunk or rows_per_file(listed, config.image)

    if table.exists:
        next_plan(rows, table, folder, config.filter, config.retried(), size, plan)
        return None
    return first_plan(rows, folder, size, plan)


def _work(cluster: Cluster, config: IngestConfig, table: Table, run: Run) -> None:
    """Do what a run has planned and not done yet; then look for copies in the whole table."""
    if pending := run.pending(table):
        fetched = run.describe()["fetched"]
        if fetched:
            cpus = cluster.resources().get("CPU", 1)
            print(estimate(fetched, table, config.image, cpus), flush=True)
        watch = Throughput(run)
        run_chunks(
            cluster,
            pending,
            partial(_stages, cluster=cluster, config=config, run=run),
            Merge(table, run),
            "ingest",
            fetched,
            done=table.counts() if run.number == 1 else {},
            watch=watch,
        )
        watch.end()
    mark_duplicates(cluster, table, config.duplicates, run.number, run.folder / "copies")
    write_link_rot(cluster, table, run)


def _open_run(config: IngestConfig, table: Table) -> Run:
    """The run that is to be worked on: the last one, or a new one with its plan."""
    files = input_files(config.data.input)
    settings = config.run_settings(files)
    if table.exists:
        last = last_run(table)
        if last is None:
            raise RunError(f"{table.folder} holds a table without runs: choose another data.output")
        same = last.describe()["settings"] == settings
        if same and not (last.is_finished and (config.retry or table.pending())):
            return last
    else:
        remove_folder(table.folder / FOLDER)  # of a planning that was killed
    run, plan = next_run(table), Plan()
    chunks = _plan_into(run.plan_folder, files, config, table, plan)
    if chunks is not None:
        write_atomically(table.folder / CHUNKS_FILE, chunks)
    about = {name: value for name, value in vars(plan).items() if name != "chunks"}
    run.begin(settings, plan.chunks, **about)
    if not table.exists:
        table.create(KIND, config.identity(), len(plan.chunks))
    return run


class Merge:
    """Writes a chunk: what was fetched and marked, in the place of what its part had of it."""

    def __init__(self, table: Table, run: Run) -> None:
        self.table = table
        self.run = run

    def __call__(self, chunk: int, fetched: pa.Table) -> None:
        with _writing:
            if fetched.num_rows or not self.table.is_committed(chunk):
                self._write(chunk, fetched)
            else:
                self._update(chunk)

    def _write(self, chunk: int, fetched: pa.Table) -> None:
        number = pa.array([self.run.number] * fetched.num_rows, pa.int32())
        position = fetched.schema.get_field_index("run")
        rows = fetched.set_column(position, IMAGE_ROW.field("run"), number)
        if self.table.is_committed(chunk):
            rows = pa.concat_tables([self._kept(chunk, rows["key"]), rows])
        order = pc.sort_indices(rows["key"])
        self.table.write(
            chunk, rows.take(order), run=self.run.number, row_group_size=IMAGE_ROW_GROUP
        )

    def _kept(self, chunk: int, fetched: pa.ChunkedArray) -> pa.Table:
        """The rows of the part that were not fetched, with their new marks and metadata."""
        there = read_parquet_file(self.table.part(chunk))
        there = there.filter(pc.invert(pc.is_in(there["key"], value_set=fetched)))
        return with_marks(there, self._marked(chunk))

    def _update(self, chunk: int) -> None:
        """Mark rows of a part of which nothing was fetched: its pictures stay where they are."""
        with open_parquet(self.table.part(chunk)) as parquet:
            there = parquet.read(columns=["key", "status", *CARRIED])
        rows = with_marks(there, self._marked(chunk))
        changed = [n for n in CARRIED if not rows[n].equals(there[n])]
        columns = rows.select(["status", *changed])
        self.table.update(chunk, columns, run=self.run.number, row_group_size=IMAGE_ROW_GROUP)

    def _marked(self, chunk: int) -> pa.Table:
        """The rows of the chunk's plan that are marked and not fetched."""
        plan = read_parquet_file(chunk_file(self.run.plan_folder, chunk))
        return plan.filter(plan["mark"].is_valid())


def _stages(chunks: Any, last: Step, cluster: Cluster, config: IngestConfig, run: Run) -> Any:
    """The dataset of what `last` says of the IMAGE_ROW rows of a dataset of chunk numbers."""
    nodes = cluster.cpus_by_node()
    fetchers, decoders = fetchers_of(nodes)
    cpus = max(1, sum(nodes))
    least, most = _CHUNKS_IN_WORK
    told = run.describe()
    in_work = min(most, max(least, _ROWS_IN_WORK * len(told["chunks"]) // max(1, told["fetched"])))
    options: dict[str, Any] = {**WHOLE, "num_cpus": decoders}  # the same in both: Ray fuses them
    read = ReadPlan(run, Merge(Table(config.data.output), run))
    planned = chunks.map_batches(read, **options)
    download = share_of(config.download, fetchers, cpus)
    settings = (download, config.image, config.filter, decoders)
    return planned.map_batches(
        FetchAndWrite,
        fn_constructor_args=(ImageFetcher, settings, last),
        compute=cluster.actors(
            fetchers,
            None if config.ray.cluster else fetchers,  # a cluster may grow
            max_concurrent_calls_per_actor=in_work,
            max_tasks_in_flight_per_actor=in_work + 1,
            enable_true_multi_threading=True,
        ),
        **options,
    )


class FetchAndWrite:
    """Last step of a chunk: what the `fetcher` makes of its rows, and `last` of that."""

    def __init__(self, fetcher: type[ImageFetcher], settings: tuple[Any, ...], last: Step) -> None:
        self.fetch = fetcher(*settings)
        self.last = last

    def __call__(self, rows: pa.Table) -> pa.Table:
        return self.last(self.fetch(rows))

    def close(self) -> None:
        """End the fetcher's connections and decoders."""
        self.fetch.close()


class ReadPlan:
    """First step of a chunk: its METADATA_ROW rows that are to be fetched, with its number."""

    def __init__(self, run: Run, merge: Merge) -> None:
        self.run = run
        self.merge = merge

    def __call__(self, chunks: pa.Table) -> pa.Table:
        (chunk,) = chunks["chunk"].to_pylist()
        plan = read_parquet_file(chunk_file(self.run.plan_folder, chunk))
        rows = plan.filter(plan["mark"].is_null()).drop_columns(["mark"])
        blocked = Blocked.read(self.merge.table)  # since the run was planned, perhaps
        rows = rows.filter(pa.array(~blocked.mask(rows["key"], rows["url"])))
        if not rows.num_rows:  # Ray Data passes on no empty block
            self.merge(chunk, with_image_feature(IMAGE_ROW).empty_table())
        return rows.append_column("chunk", pa.array([chunk] * rows.num_rows, pa.int64()))
