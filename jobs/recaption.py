"""Recaption: writes a caption for every image of a table with the trained captioner.

Needs an image table and, as model.path, the run of stage 2; leaves a caption table with a card
(README.md) and a report (_report.html). The same command continues a run that was killed; each
image gets one row.
"""

import sys

from pipelines.cli.main import main
from pipelines.execution.progress import counts_table
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.job import recaption


def run(config: RecaptionConfig) -> None:
    counts = recaption(config)
    print(counts_table(counts))
    print(f"captions: {config.data.output}")


if __name__ == "__main__":
    sys.exit(main(RecaptionConfig, run, __doc__, {"--format": "format"}))
