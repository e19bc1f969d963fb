"""Settings of an export."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.cli.config import InputPath, OutputPath
from pipelines.execution.model import ModelSettings
from vlv_model.config import Config, Precision


class ExportConfig(Config):
    """All settings of `jobs/export.py`."""

    output: OutputPath = Field(description="folder to write")
    model: ModelSettings = ModelSettings()
    from_reference: InputPath | None = Field(
        None,
        description="checkpoint of the published implementation, instead of model.path: its stage-2 "
        "model.pt, a consolidated state dict (.bin, .pt, .safetensors) or a DeepSpeed folder",
    )
    precision: Precision = Field(
        "float32",
        description="precision of all weights in the folder; bfloat16 halves its size and gives the "
        "captions of generate.precision=bfloat16",
    )
    parts: Literal["needed", "all"] = Field(
        "needed",
        description="base models in the folder: those that the model needs, or also those of the "
        "other stage (VAE and UNet with a captioner, the language model with an encoder)",
    )
    license: str = Field(
        "other",
        min_length=1,
        description="licence in the model card, by its name on the hub; the base models' licences "
        "apply in addition",
    )
    dry_run: bool = Field(
        False, description="only print the size of the folder, from the models' configurations"
    )
