"""Simulates a machine that opens a training run whose models are hub ids.

    python -m tests.pipelines.training.hub_machine WORD … SETTING …

Runs the words in order: `open` opens the run and claims its folder, `load` also loads its models, `save`
also writes its first checkpoint, `other=FLORENCE` opens it with another model, `push=FOLDER` makes a
commit the newest of its hub repository. Prints a line for each: the florence model, or the error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipelines.cli.config import load
from pipelines.training import run_folder
from pipelines.training.config import Stage1Config
from pipelines.training.job import open_run
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.checkpoints.weights import CheckpointMetadata, save_checkpoint
from vlv_model.errors import VLVError


def main(words: list[str], settings: list[str]) -> None:
    for word in words:
        config = load(Stage1Config, None, settings)
        try:
            if word.startswith("push="):
                os.utime(word[5:])
            if word.startswith("other="):
                config = load(Stage1Config, None, [*settings, f"model.florence={word[6:]}"])
            run = open_run(config)
            run_folder.claim(Path(config.run_dir), run.identity)
            if word in ("load", "save"):
                autoencoder = VLVAutoEncoder.from_pretrained(run.model)
            if word == "save":
                about = CheckpointMetadata(
                    stage="stage1", step=1, rows_seen=8, config={}, model=run.model
                )
                folder = Path(config.run_dir) / "checkpoints/step-00000001"
                save_checkpoint(folder, autoencoder, about)
            print(f"{word}: {run.model.florence}", flush=True)
        except VLVError as error:
            print(f"{word}: {error}", flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    settings = [
        word for word in given if "." in word.partition("=")[0] or word.startswith("run_dir")
    ]
    main([word for word in given if word not in settings], settings)
