"""Takedown: removes rows from an image table and from tables made of it, and keeps them out.

Rows are named by key, by URL, or by domain with all of its subdomains. What was taken down is
noted in the image table: no later ingest fetches it.

    python jobs/takedown.py /data/images domains=example.org derived=/data/captions,/data/pairs
"""

import sys

from pipelines.entry import main
from pipelines.takedown import TakedownConfig, take_down


def run(config: TakedownConfig) -> None:
    for table, rows in take_down(config).items():
        print(f"{rows:>9,} rows removed from {table}")


if __name__ == "__main__":
    sys.exit(main(TakedownConfig, run, __doc__, aliases={"": "table"}))
