"""Download, filter and store the images of a list of URLs as an image table.

Every URL that is tried becomes one row, with the image or with a status that says why there is
none. The same command again continues a killed run, and does nothing when the table is complete.

    python jobs/ingest.py data.input=laion.parquet data.output=runs/images filter.min_aesthetic=6
"""

from __future__ import annotations

import sys

from pipelines.entry import main
from pipelines.ingest.dataset import IngestConfig, ingest
from pipelines.runtime import counts_table
from pipelines.storage import Table


def run(config: IngestConfig) -> None:
    table = Table(config.data.output)
    complete = table.exists and not table.pending()
    counts = ingest(config)
    about = table.describe()
    if complete:
        print("this table is complete already: nothing was downloaded")
    print(counts_table(counts))
    for rule, rows in about["dropped"].items():
        print(f"not fetched: {rule} {rows:,}")
    print(f"metadata rows read: {about['read']:,}")
    print(f"image table: {config.data.output}")


if __name__ == "__main__":
    sys.exit(main(IngestConfig, run, __doc__))
