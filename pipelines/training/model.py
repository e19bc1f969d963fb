"""Which model a job opens: the settings under `model.*`, the same in every job."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from pipelines.config import InputPath
from pipelines.training.checkpointing import latest_checkpoint
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError


class ModelSettings(ModelConfig):
    """The base models and, with `path`, the trained weights on top of them."""

    path: InputPath | None = Field(
        None,
        description="what to start from: the run folder of a training, one of its checkpoints, or "
        "a folder of base models (with model.json); settings given beside it win over its own",
    )

    def resolve(self) -> tuple[ModelConfig, Path | None]:
        """(base models and sizes, folder of the checkpoint or None).

        Raises ModelError or CheckpointError where `path` is not what it should be.
        """
        # Here, so that --help need not wait for the libraries of the models.
        from vlv_model.loading import resolve_model

        given = self.model_dump(include=self.model_fields_set - {"path"})
        if self.path is None:
            return ModelConfig(**given), None
        folder = Path(self.path)
        if os.path.isfile(folder / "run.json"):
            folder = latest_checkpoint(folder) or folder
            if not os.path.isfile(folder / "checkpoint.json"):
                raise CheckpointError(
                    f"model.path={self.path}: this run has no finished checkpoint yet: "
                    "let its training reach one"
                )
        config, checkpoint = resolve_model(folder)
        return config.model_copy(update=given), checkpoint
