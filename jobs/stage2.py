"""Stage 2: Qwen2.5 learns to read the encoder's embeddings as a caption.

Needs image + caption pairs and, as model.path, the run of stage 1. Captions are a column of
data.input, or are joined to it from data.captions by key or URL. The same command continues a run
that was killed. Recipes: jobs/configs.
"""

import sys

from pipelines.cli.main import main
from pipelines.training.config import Stage2Config
from pipelines.training.job import show, train
from pipelines.training.pairs import with_pairs


def run(config: Stage2Config) -> None:
    show(config, train(with_pairs(config)))


if __name__ == "__main__":
    sys.exit(main(Stage2Config, run, __doc__))
