"""The ingest job: metadata -> plan -> download -> decode -> image table.

A run is planned once (plan.py); then its chunks stream through the cluster:

    chunk -> its plan -> ImageFetcher        connections and decoders
                              |  IMAGE_ROW
                              v
                         WritePart: with the existing part -> part + commit

One process does all of a chunk (steps.py), so no image passes through Ray's object store. A killed job
continues with the chunks that its run has not committed (pipelines/images/runs.py).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.execution.chunks import run_chunks
from pipelines.execution.cluster import Cluster
from pipelines.execution.steps import PlacedStep
from pipelines.execution.table_job import TableJob, run_table_job
from pipelines.images.blocklist import Blocklist
from pipelines.images.rows import IMAGE_ROW
from pipelines.images.runs import FOLDER, Run, last_run, next_run
from pipelines.ingest.config import RULES_SETTING, IngestConfig
from pipelines.ingest.duplicates import mark_duplicates
from pipelines.ingest.estimate import count_places, count_sites, estimate, rows_per_file
from pipelines.ingest.find_images import find_images
from pipelines.ingest.known_rows import KnownKeys
from pipelines.ingest.local_images import LocalImages
from pipelines.ingest.plan import CHUNKS_FILE, Plan, first_plan, next_plan, read_list
from pipelines.ingest.report import REPORT, remove_report, write_report
from pipelines.ingest.run_statistics import ThroughputLog, write_host_statistics
from pipelines.ingest.steps import ImageFetcher, ImageReader, IngestChunk, WritePart, fetchers_of
from pipelines.ingest.unpack import unpack, write_wanted
from pipelines.ingest.web.config import PER_CPU, config_per_process
from pipelines.ingest.web.environment import requests_that_fit, warn_of_ignored_proxies
from pipelines.ingest.web.optout import DEFAULT_RULES, Rule, recorded_rules
from pipelines.ingest.web.proxy import Proxy, check_proxy
from pipelines.ingest.web.rules_store import RulesStore
from pipelines.ingest.web.site_rules import SITE_RULES
from pipelines.lists.input_files import input_files
from pipelines.storage.files import is_file, write_atomically
from pipelines.storage.fingerprints import content_fingerprint
from pipelines.storage.folders import is_folder, remove_folder
from pipelines.storage.tables import Table
from vlv_model.errors import RunError

KIND = "image"

# Rows that one fetcher has in flight: while a chunk waits for its slowest host, connections and
# decoders serve the other chunks.
_ROWS_IN_FLIGHT = 4096
_CHUNKS_IN_FLIGHT = (2, 16)  # at least, at most


def ingest(config: IngestConfig) -> dict[str, int]:
    """Create or update the image table of a list of URLs. Returns the number of rows by status.

    Every row of the list becomes one row of IMAGE_ROW: `ok`, `download:…`, `decode:…`, or
    `filtered:…` by the image's own size. Rows that filters drop by their metadata, and repeated URLs,
    are counted by rule in the run's `run.json`. An existing table gets new rows and retries of failed
    rows whose class `retry` names; rows that the filters now drop are marked. New texts, scores and
    licences of a known URL are taken over without a download.

    Raises DataError for an unusable list. Raises RunError if `data.output` holds something else, or
    images that are stored another way, or if `download.proxy` cannot be used.
    """
    return run_table_job(Ingest(config), config.data.output, config.ray)


class Ingest(TableJob):
    """One run into an image table."""

    def __init__(self, config: IngestConfig) -> None:
        self.config = config
        self.current: Run  # set by `plan`
        self.was_done = False

    def check(self, table: Table) -> None:
        table.check_same_run(KIND, self.config.identity(), IMAGE_ROW.names)

    def plan(self, table: Table) -> None:
        """Continue the last run, or plan a new one."""
        given = self.config.download.respect_optout
        last = last_run(table) if table.exists else None
        settings = last.describe()["settings"] if last else {}
        self.config = self.config.with_rules_of(settings)
        self.current = self._continue_or_plan(table)
        self.was_done = self.is_done(table)
        if self.current.describe().get("local"):
            return
        download = self.config.download
        if not self.was_done and self.current.describe()["fetched"]:
            _tell_of_rules(given, self.config, settings)
        if download.proxy is None:
            warn_of_ignored_proxies()
        elif not self.was_done and self.current.describe()["fetched"]:
            check_proxy(Proxy.parse(download.proxy), download.total_timeout)
        requests_that_fit(
            download.concurrency or PER_CPU
        )  # warns here: actors' output is not shown
        if download.allow_private:
            print(
                "warning: download.allow_private=true: URLs may reach this machine and its network",
                file=sys.stderr,
            )

    def _continue_or_plan(self, table: Table) -> Run:
        files = _input(self.config)
        if isinstance(files, LocalImages):
            settings = self.config.run_settings(files.fingerprint())
        else:
            settings = self.config.run_settings(content_fingerprint(files))
        if table.exists:
            last = last_run(table)
            if last is None:
                raise RunError(
                    f"{table.folder} holds a table without runs: choose another data.output"
                )
            same = _comparable(last.describe()["settings"]) == settings
            if same and not (last.is_finished and (self.config.retry or table.pending())):
                return last
        else:
            remove_folder(table.folder / FOLDER)  # from a job that was killed while planning
        run, plan = next_run(table), Plan()
        chunks = _plan_into(run.plan_folder, files, self.config, table, plan)
        if chunks is not None:
            write_atomically(table.folder / CHUNKS_FILE, chunks)
        skipped = ("chunks", "sites", "site_files", "places")
        about = {name: value for name, value in vars(plan).items() if name not in skipped}
        if isinstance(files, LocalImages):
            about |= {"local": True, "image_column": files.source.column}
            about["units"] = write_wanted(run) if files.source.column else 0
        run.begin(settings, plan.chunks, **about)
        if not table.exists:
            table.create(KIND, self.config.identity(), len(plan.chunks))
        return run

    def is_done(self, table: Table) -> bool:
        return self.current.is_finished

    def run(self, table: Table, cluster: Cluster) -> None:
        """Do the pending chunks of the run; then find duplicates in the whole table."""
        run = self.current
        if pending := run.pending(table):
            about = run.describe()
            fetched, local = about["fetched"], about.get("local")
            if fetched:
                cpus = cluster.resources().get("CPU", 1)
                alive = {"alive": 1.0} if local else {}
                print(estimate(fetched, table, self.config.image, cpus, **alive), flush=True)
            if about.get("units"):
                unpack(cluster, run, about["image_column"])
            throughput = ThroughputLog(run)
            rules_store = (
                None if local else _rules_store(cluster, self.config)
            )  # ends when no name holds it
            run_chunks(
                cluster,
                pending,
                [_step(cluster, self.config, run, rules_store)],
                WritePart(table, run),
                "ingest",
                fetched,
                done=table.counts() if run.number == 1 else {},
                watch=throughput,
            )
            throughput.write()
        marks = run.folder / "copies"
        mark_duplicates(cluster, table, self.config.duplicates, run.number, marks)
        write_host_statistics(cluster, table, run)

    def finish(self, table: Table) -> None:
        if not self.was_done:
            remove_report(table)  # or after a kill here the last run's page would stay
        self.current.end(table.counts())
        if not (self.was_done and is_file(table.folder / REPORT)):
            write_report(table)
        super().finish(table)


def plan_only(config: IngestConfig) -> Plan:
    """The plan of a run, for a dry run; the table is not changed."""
    table, plan = Table(config.data.output), Plan()
    if is_folder(table.folder):
        table.check_same_run(KIND, config.identity(), IMAGE_ROW.names)
    if table.exists and (last := last_run(table)):
        config = config.with_rules_of(last.describe()["settings"])
    with tempfile.TemporaryDirectory(prefix="vlv-plan-") as folder:
        files = _input(config)
        _plan_into(Path(folder), files, config, table, plan)
        if isinstance(files, LocalImages):
            plan.places = count_places(Path(folder))
            return plan
        plan.site_files = [rule for rule in config.download.rules if rule in SITE_RULES]
        if plan.site_files:
            plan.sites = count_sites(Path(folder))
    return plan


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings, as this version would record them."""
    rules = {
        name: list(recorded_rules(settings[name])) for name in settings.keys() & {RULES_SETTING}
    }
    return {**settings, **rules}


def _tell_of_rules(
    given: bool | tuple[Rule, ...], config: IngestConfig, recorded: Mapping[str, Any]
) -> None:
    """Print a line if the rules of a table's last run are others than a new table's, or than these."""
    if RULES_SETTING not in recorded:
        return
    before, now = recorded_rules(recorded[RULES_SETTING]), config.download.rules
    if before != now:
        print(
            f"{RULES_SETTING}: {_words(now)} from this run on, {_words(before)} before; rows of earlier "
            "runs stay as they are (retry=opted_out fetches the refused ones again)",
            file=sys.stderr,
        )
    elif given is True and now != DEFAULT_RULES:
        print(
            f"{RULES_SETTING}: this table keeps its rules: {_words(now)}; a new table has "
            f"{_words(DEFAULT_RULES)}: name rules to change them",
            file=sys.stderr,
        )


def _words(rules: Sequence[Rule]) -> str:
    return ",".join(rules) or "none"


def _rules_store(cluster: Cluster, config: IngestConfig) -> Any:
    """The handle of the store of the sites' rules; None if one process fetches alone, or none reads them."""
    if not set(config.download.rules) & set(SITE_RULES):
        return None
    fetchers, _ = fetchers_of(cluster.cpus_by_node())
    is_alone = fetchers == 1 and not config.ray.cluster
    return None if is_alone else cluster.shared(RulesStore)


def _input(config: IngestConfig) -> list[Path] | LocalImages:
    """The files of a list of URLs, or images that are there."""
    data = config.data
    images = find_images(data.input, data.image_column, data.columns, data.image_encoding)
    return images or input_files(data.input)


def _plan_into(
    folder: Path, files: list[Path] | LocalImages, config: IngestConfig, table: Table, plan: Plan
) -> bytes | None:
    """Write the plan of a run into `folder`; of a first run, return CHUNKS_FILE's content."""
    known = KnownKeys(table) if table.exists else None
    blocked = Blocklist.read(table)
    rows = read_list(files, config.filter, config.data.columns, plan, blocked, known=known)
    size = partial(rows_per_file, image=config.image, rows_per_chunk=config.rows_per_chunk)
    if table.exists:
        next_plan(rows, table, folder, config.filter, config.retried(), size, plan)
        return None
    return first_plan(rows, folder, size, plan)


def _step(cluster: Cluster, config: IngestConfig, run: Run, rules_store: Any) -> PlacedStep:
    """The step that fetches the rows of a chunk."""
    nodes = cluster.cpus_by_node()
    fetchers, decoders = fetchers_of(nodes)
    cpus = max(1, sum(nodes))
    at_least, at_most = _CHUNKS_IN_FLIGHT
    about = run.describe()
    fitting = _ROWS_IN_FLIGHT * len(about["chunks"]) // max(1, about["fetched"])
    download = config_per_process(config.download, fetchers, cpus)
    fetcher: type[ImageFetcher] | type[ImageReader] = ImageFetcher
    settings: tuple[Any, ...] = (download, config.image, config.filter, decoders, rules_store)
    if about.get("local"):
        fetcher = ImageReader
        unpacked = run if about["units"] else None
        source = (about["image_column"], config.data.image_encoding, unpacked)
        settings = (config.image, config.filter, decoders, *source)
    return PlacedStep(
        IngestChunk,
        (fetcher, settings, run, Table(config.data.output)),
        resources={"num_cpus": decoders},
        actors=(fetchers, None if config.ray.cluster else fetchers),  # a cluster may grow
        in_flight=min(at_most, max(at_least, fitting)),
    )
