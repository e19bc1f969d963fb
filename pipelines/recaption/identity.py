"""What a caption is made of, as settings and as one fingerprint. Imports no torch: checks come first."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipelines.recaption.config import GenerateConfig
from vlv_model.checkpoints.files import read_checkpoint
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError


def caption_identity(
    model: ModelConfig, checkpoint: Path | None, generate: GenerateConfig
) -> dict[str, Any]:
    """Everything that affects captions: weights, base models, sizes, decoding.

    Raises CheckpointError when `checkpoint` is not of stage 2.
    """
    if checkpoint is None or (info := read_checkpoint(checkpoint)).stage != "stage2":
        raise CheckpointError(
            "model.path must be a stage-2 run or checkpoint: only stage 2 trains a captioner"
        )
    identity: dict[str, Any] = {
        "weights": info.sha256,
        "parent": info.parent.sha256 if info.parent else None,
        "base_models": info.base_models,
        "sizes": [model.num_queries, model.image_size, model.encoder_image_size, model.prompt],
        "generate": generate.identity(),
    }
    # Only if not the default, so that captions of earlier versions keep their fingerprint.
    if model.preprocess != "default":
        identity["preprocess"] = model.preprocess
    if model.bottleneck != info.model.bottleneck:
        identity["bottleneck"] = model.bottleneck
    return identity


def model_fingerprint(model: ModelConfig, checkpoint: Path | None, generate: GenerateConfig) -> str:
    """16 hex digits of `caption_identity`."""
    identity = caption_identity(model, checkpoint, generate)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
