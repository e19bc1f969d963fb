"""The frame of every job that writes a table: check, lock, plan, run, finish.

check    the folder is free, or holds this job's table; no file is written yet
lock     from here to the end nobody else plans, writes or publishes
plan     what is left to do, stored in the table: the attempt after a kill continues with it
run      on a cluster, if something is left
finish   the files beside the rows: reports, cards
"""

from __future__ import annotations

from pipelines.execution.cluster import Cluster
from pipelines.execution.connection import RayConfig, ray_session
from pipelines.images.card import write_card
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import Table


class TableJob:
    """A job that writes one table. A job overrides the steps that it needs."""

    def check(self, table: Table) -> None:
        """Raise RunError if the folder holds something else; writes nothing."""

    def plan(self, table: Table) -> None:
        """Store what is left to do, and create the table if there is none."""

    def is_done(self, table: Table) -> bool:
        """Whether `run` would have nothing to do."""
        return not table.pending()

    def run(self, table: Table, cluster: Cluster) -> None:
        """Write what is left."""

    def finish(self, table: Table) -> None:
        """Write the files beside the rows, at least the card; also if `run` had nothing to do."""
        write_card(table)


def run_table_job(job: TableJob, output: str, ray: RayConfig) -> dict[str, int]:
    """Do what is left of a job; returns the rows of its table by status.

    Raises RunError if another process holds the table, and what the job's steps raise.
    """
    table = Table(output)
    job.check(table)
    with lock_folder(table.folder, "data.output"):
        job.check(table)  # another job may have made the table since
        job.plan(table)
        if not job.is_done(table):
            with ray_session(ray) as cluster:
                job.run(table, cluster)
        job.finish(table)
        return table.counts()
