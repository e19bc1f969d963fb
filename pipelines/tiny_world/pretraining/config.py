"""Settings of the tiny models' pretraining."""

from __future__ import annotations

from pydantic import Field

from pipelines.cli.config import InputPath, OutputPath
from vlv_model.config import Config


class PretrainConfig(Config):
    """All settings of `jobs/pretrain_tiny.py`."""

    output: OutputPath = Field(description="folder of the models")
    stage1: InputPath | None = Field(
        None,
        description="finished stage-1 run on these models, whose weights are copied into the folder "
        "stage1 next to `output`",
    )
    seed: int = Field(0, ge=0, description="seed of weights, drawings and training")
    pictures: int = Field(16_000, ge=64, description="number of training scenes")
    validation_pictures: int = Field(256, ge=32, description="number of evaluation scenes")
    vae_steps: int = Field(3_000, ge=1, description="updates of the VAE, 16 pictures each")
    text_encoder_steps: int = Field(
        400, ge=1, description="updates of the CLIP text encoder alone, 256 pairs each"
    )
    text_to_image_steps: int = Field(
        1_500, ge=1, description="updates of the CLIP text encoder and the UNet, 64 pictures each"
    )
    vision_steps: int = Field(
        1_200, ge=1, description="updates of Florence-2's vision tower, 32 pictures each"
    )
    florence_steps: int = Field(
        2_500, ge=1, description="updates of Florence-2's language model, 32 pictures each"
    )
    language_model_steps: int = Field(
        400, ge=1, description="updates of the language model, 64 texts each"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; default: one per core")
