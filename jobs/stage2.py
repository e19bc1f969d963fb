"""Train Qwen2.5 to decode the encoder's embeddings into captions (stage 2).

Input: images, their captions, and model.path, a stage-1 run. Captions lie with the images, or
in data.captions, which name their images by key, URL or file name.
Output: a run folder with checkpoints, metrics.jsonl, result.json and report.html.
Repeat the command to continue an interrupted run. Recipes: jobs/configs.
"""

import sys

from pipelines.cli.main import main
from pipelines.estimate.config import MACHINE
from pipelines.training.config import Stage2Config
from pipelines.training.job import show, train


def run(config: Stage2Config) -> None:
    if config.dry_run:
        from pipelines.training.dry_run import dry_run  # the model libraries would delay --help

        print(dry_run(config))
        return
    show(config, train(config))


if __name__ == "__main__":
    sys.exit(main(Stage2Config, run, __doc__, MACHINE))
