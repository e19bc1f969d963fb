"""Pretrain the tiny base models that `make demo` starts from.

Trains a VAE, a text-to-image diffusion model, Florence-2 on regions and a language model on texts,
all on scenes of the training split only. Takes about 25 minutes on two idle cores. Repeat the
command to continue an interrupted run at the model it was training.

    python jobs/pretrain_tiny.py /data/tiny
"""

import sys

from pipelines.cli.main import main
from pipelines.tiny_world.pretraining.config import PretrainConfig


def run(config: PretrainConfig) -> None:
    from pipelines.tiny_world.pretraining.parts import pretrain

    pretrain(config)
    print(f"models: {config.output}")


if __name__ == "__main__":
    sys.exit(main(PretrainConfig, run, __doc__, aliases={"": "output"}))
