"""Pretrain tiny: trains the tiny world's base models, which `make demo` takes as given.

A VAE, a text-to-image diffusion model, Florence-2 on regions and a language model on texts, all
from scenes of the training split alone. About 25 minutes on two idle cores. The same command
continues a run that was killed, at the part that it was in.
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
