"""Precompute the VAE latents of images, so that stage 1 does not run the VAE.

Input: the images of stage 1, and the same model.* settings as stage 1.
Output: a table of latents with one row per image; pass it to stage 1 as data.latents.
Repeat the command to continue an interrupted run.
"""

import sys

from pipelines.cli.main import main
from pipelines.estimate.config import MACHINE
from pipelines.execution.progress import counts_table
from pipelines.precompute.config import PrecomputeConfig
from pipelines.precompute.job import precompute


def run(config: PrecomputeConfig) -> None:
    if config.dry_run:
        from pipelines.precompute.dry_run import dry_run  # the model libraries would delay --help

        print(dry_run(config))
        return
    counts = precompute(config)
    print(counts_table(counts))
    print(f"latents: {config.data.output}")


if __name__ == "__main__":
    sys.exit(main(PrecomputeConfig, run, __doc__, MACHINE))
