"""Train the VLV encoder on images alone, through the frozen diffusion decoder (stage 1).

Input: images (a table of ingest, a folder, shards, Parquet of others), and the base models in model.*.
Output: a run folder with checkpoints, metrics.jsonl, result.json and report.html.
Repeat the command to continue an interrupted run. Recipes: jobs/configs.
"""

import sys

from pipelines.cli.main import main
from pipelines.estimate.config import MACHINE
from pipelines.training.config import Stage1Config
from pipelines.training.job import show, train


def run(config: Stage1Config) -> None:
    if config.dry_run:
        from pipelines.training.dry_run import dry_run  # the model libraries would delay --help

        print(dry_run(config))
        return
    show(config, train(config))


if __name__ == "__main__":
    sys.exit(main(Stage1Config, run, __doc__, MACHINE))
