"""Embed images or captions: a table of features by CLIP, DINOv2, FID's Inception or an aesthetic predictor.

Input: images in any layout that recaption reads, or a table of captions; a frozen model.
Output: a table of features by key, which metrics, data.features and duplicates read.
Repeat the command to continue an interrupted run.
"""

import sys

from pipelines.cli.main import main
from pipelines.embed.config import EmbedConfig
from pipelines.embed.job import embed
from pipelines.estimate.config import MACHINE
from pipelines.execution.progress import counts_table


def run(config: EmbedConfig) -> None:
    if config.dry_run:
        from pipelines.embed.dry_run import dry_run  # the model libraries would delay --help

        print(dry_run(config))
        return
    counts = embed(config)
    print(counts_table(counts))
    print(f"features: {config.data.output}")


if __name__ == "__main__":
    sys.exit(main(EmbedConfig, run, __doc__, MACHINE))
