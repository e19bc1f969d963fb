"""Caption every image of a table with a trained captioner.

Input: an image table, and model.path, a stage-2 run.
Output: a caption table with one row per image, a dataset card (README.md) and a report
(_report.html).
Repeat the command to continue an interrupted run.
"""

import sys

from pipelines.cli.main import main
from pipelines.estimate.config import MACHINE
from pipelines.execution.progress import counts_table
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.job import recaption
from pipelines.recaption.summary import summary
from pipelines.storage.tables import Table
from vlv_model.errors import DataError


def run(config: RecaptionConfig) -> None:
    if config.dry_run:
        from pipelines.recaption.dry_run import dry_run  # the model libraries would delay --help

        print(dry_run(config))
        return
    counts = recaption(config)
    print(counts_table(counts))
    print(summary(Table(config.data.output)))
    print(f"captions: {config.data.output}")
    if not counts.get("ok"):
        raise DataError(
            f"no image has a caption: the column error of {config.data.output} says why"
        )


if __name__ == "__main__":
    sys.exit(main(RecaptionConfig, run, __doc__, {"--format": "format", **MACHINE}))
