"""Stage 1: the VLV encoder learns from images alone, through the frozen diffusion decoder.

Needs an image table and the base models; leaves a run folder with checkpoints, metrics.jsonl and
result.json. The same command continues a run that was killed. Recipes: jobs/configs.
"""

import sys

from pipelines.cli.main import main
from pipelines.training.config import Stage1Config
from pipelines.training.job import show, train


def run(config: Stage1Config) -> None:
    show(config, train(config))


if __name__ == "__main__":
    sys.exit(main(Stage1Config, run, __doc__))
