"""Reconstruct images from their caption embeddings, to see what the encoder captures.

Input: an image table, and model.path, a stage-1 run.
Output: a table of generated pictures, by key.
"""

import sys

from pipelines.cli.main import main
from pipelines.estimate.config import MACHINE
from pipelines.execution.progress import counts_table
from pipelines.reconstruct.config import ReconstructConfig
from pipelines.reconstruct.job import reconstruct


def run(config: ReconstructConfig) -> None:
    if config.dry_run:
        from pipelines.reconstruct.dry_run import dry_run  # the model libraries would delay --help

        print(dry_run(config))
        return
    counts = reconstruct(config)
    print(counts_table(counts))
    print(f"pictures: {config.data.output}")


if __name__ == "__main__":
    sys.exit(main(ReconstructConfig, run, __doc__, MACHINE))
