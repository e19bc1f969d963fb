"""Caption every image of a table with a trained captioner.

Input: an image table, and model.path, a stage-2 run.
Output: a caption table with one row per image, a dataset card (README.md) and a report
(_report.html).
Repeat the command to continue an interrupted run.
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
