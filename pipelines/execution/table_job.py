"""The frame of every job that writes a table: open, lock, plan, run, finish.

check ── the folder is free, or holds this job's table; nothing is written yet
lock  ── from here to the end nobody else plans, writes or publishes
plan  ── what is left to do, remembered in the table: an attempt that is killed goes on with it
run   ── on a cluster, and only where something is left
finish ─ what stands beside the rows: reports, cards, files
"""

from __future__ import annotations

from pipelines.execution.cluster import Cluster
from pipelines.execution.connection import RayConfig, ray_session
from pipelines.images.card import write_card
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import Table


class TableJob:
    """A job that writes one table. A step that has nothing to do is left as it is here."""

    def check(self, table: Table) -> None:
        """Raise RunError where the folder holds something else; nothing may be written yet."""

    def plan(self, table: Table) -> None:
        """Lay out what is left to do, and make the table where there is none."""

    def is_done(self, table: Table) -> bool:
        """Whether `run` would have nothing to do."""
        return not table.pending()

    def run(self, table: Table, cluster: Cluster) -> None:
        """Write what is left."""

    def finish(self, table: Table) -> None:
        """Write what stands beside the rows, its card at least; also where `run` had nothing to do."""
        write_card(table)


def run_table_job(job: TableJob, output: str, ray: RayConfig) -> dict[str, int]:
    """Do what is left of a job; the rows of its table by status.

    Raises RunError where another process holds the table, and what the job's steps raise.
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
