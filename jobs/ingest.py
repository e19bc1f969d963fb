"""Download, filter and store the images of a list of URLs as an image table, or images that are there.

Every URL that is fetched becomes one row: the image, or a status that says why there is none.
Repeat the command to continue an interrupted run; a complete table is left alone. An existing table
gets only missing rows: new URLs of the list and, with `retry`, failed ones. Rows that no longer pass
changed filters are marked, not deleted.

    python jobs/ingest.py data.input=laion.parquet data.output=runs/images filter.min_aesthetic=6 --dry-run
    python jobs/ingest.py data.input=laion.parquet data.output=runs/images filter.min_aesthetic=6
    python jobs/ingest.py data.input=laion.parquet data.output=runs/images filter.min_aesthetic=6 retry=timeout,http_5xx
    python jobs/ingest.py data.input=img2dataset-output/ data.output=runs/images
"""

from __future__ import annotations

import os
import sys

from pipelines.cli.main import main
from pipelines.images.runs import last_run
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.estimate import estimate, places_line, plan_table, site_requests
from pipelines.ingest.job import ingest, plan_only
from pipelines.ingest.outcome import cause_of_nothing, end_of_run, retry_line
from pipelines.storage.tables import Table
from vlv_model.errors import DataError


def run(config: IngestConfig) -> None:
    table = Table(config.data.output)
    if config.dry_run:
        plan = plan_only(config)
        print(plan_table(plan))
        if plan.fetched:
            cpus = config.ray.num_cpus or os.cpu_count() or 1
            alive = {"alive": 1.0} if plan.places else {}
            print(estimate(plan.fetched, table, config.image, cpus, **alive))
            if plan.places:
                print(places_line(plan.places))
            if line := site_requests(plan):
                print(line)
        if table.exists and (failed := retry_line(table.counts(), is_rerun=True)):
            print(failed)
        return
    before = last_run(table)
    finished = before is not None and before.is_finished
    counts = ingest(config)
    last = last_run(table)
    assert last is not None
    print(end_of_run(table, last, counts, had_work=not (finished and before == last)))
    if cause := cause_of_nothing(counts, last.describe()["dropped"]):
        raise DataError(cause)


if __name__ == "__main__":
    sys.exit(main(IngestConfig, run, __doc__))
