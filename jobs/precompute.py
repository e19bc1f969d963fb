"""Precompute: what the VAE says of every image of a table, so that stage 1 need not run it.

Needs an image table and the model.* of the training; leaves a table of latents, which stage 1
takes as data.latents. The same command continues a run that was killed; each image gets one row.
"""

import sys

from pipelines.cli.main import main
from pipelines.execution.progress import counts_table
from pipelines.precompute.config import PrecomputeConfig
from pipelines.precompute.job import precompute


def run(config: PrecomputeConfig) -> None:
    counts = precompute(config)
    print(counts_table(counts))
    print(f"latents: {config.data.output}")


if __name__ == "__main__":
    sys.exit(main(PrecomputeConfig, run, __doc__))
