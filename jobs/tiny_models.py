"""Tiny models: writes a complete set of tiny base models, with random weights, to a folder.

The same classes and folder layout as the full-size models, for tests and machines without a hub.
"""

import sys
from pathlib import Path

from pydantic import Field

from pipelines.config import OutputPath
from pipelines.entry import main
from vlv_model.config import Config
from vlv_model.errors import RunError


class TinyModelsConfig(Config):
    """Everything that `jobs/tiny_models.py` needs to know."""

    output: OutputPath = Field(description="folder that the models are written to")
    seed: int = Field(0, description="seed of the random weights")


def run(config: TinyModelsConfig) -> None:
    from vlv_model.tiny import write_tiny_models

    if Path(config.output).exists():
        raise RunError(f"output={config.output} exists already: choose another folder")
    print(f"models: {write_tiny_models(config.output, config.seed)}")


if __name__ == "__main__":
    sys.exit(main(TinyModelsConfig, run, __doc__, aliases={"": "output"}))
