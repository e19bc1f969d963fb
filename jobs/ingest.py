"""Download, filter and store the images of a list of URLs as an image table.

Every URL that is fetched becomes one row: the image, or a status that says why there is none.
Repeat the command to continue an interrupted run; a complete table is left alone. An existing table
gets only missing rows: new URLs of the list and, with `retry`, failed ones. Rows that no longer pass
changed filters are marked, not deleted.

    python jobs/ingest.py data.input=laion.parquet data.output=runs/images filter.min_aesthetic=6 --dry-run
    python jobs/ingest.py data.input=laion.parquet data.output=runs/images filter.min_aesthetic=6
    python jobs/ingest.py data.input=laion.parquet data.output=runs/images filter.min_aesthetic=6 retry=timeout,http_5xx
"""

from __future__ import annotations

import os
import sys

from pipelines.cli.main import main
from pipelines.execution.progress import counts_table
from pipelines.images.runs import last_run
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.estimate import estimate, plan_table
from pipelines.ingest.job import ingest, plan_only
from pipelines.ingest.report import REPORT
from pipelines.storage.tables import Table


def run(config: IngestConfig) -> None:
    table = Table(config.data.output)
    if config.dry_run:
        plan = plan_only(config)
        print(plan_table(plan))
        if plan.fetched:
            cpus = config.ray.num_cpus or os.cpu_count() or 1
            print(estimate(plan.fetched, table, config.image, cpus))
        return
    before = last_run(table)
    finished = before is not None and before.is_finished
    counts = ingest(config)
    last = last_run(table)
    assert last is not None
    about = last.describe()
    if finished and before == last:
        print("this table is already complete: nothing was downloaded")
    else:
        fetched, marked, again = about["fetched"], about["marked"], about.get("again", 0)
        print(
            f"run {last.number}: {fetched:,} rows fetched ({again:,} of them again), {marked:,} with a "
            "new status or new metadata"
        )
    print(counts_table(counts))
    print(f"metadata rows read: {about['read']:,}")
    for rule, rows in about["dropped"].items():
        print(f"of these not fetched: {rule} {rows:,}")
    print(f"image table: {config.data.output}")
    print(f"report: {table.folder / REPORT}")


if __name__ == "__main__":
    sys.exit(main(IngestConfig, run, __doc__))
