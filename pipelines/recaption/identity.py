"""What a caption is made of, as settings and as one fingerprint. Imports no torch: checks come first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.recaption.config import GenerateConfig
from vlv_model.checkpoints.digests import short
from vlv_model.checkpoints.files import read_checkpoint
from vlv_model.checkpoints.parts import find_config
from vlv_model.checkpoints.sources import part_source
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, ConfigError

_USUAL = GenerateConfig()
_IN_IDENTITY = ("engine", "early_stopping", "temperature", "top_p", "seed", "postprocess")
"""Settings that an identity has only if they are not the usual ones."""


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


def check_length(model: ModelConfig, generate: GenerateConfig) -> None:
    """Check that the language model has a position for each embedding and token; loads no weights.

    Raises ConfigError, and ModelError when its configuration cannot be read.
    """
    known = find_config("language_model", part_source(model, "language_model")) or {}
    if (positions := known.get("max_position_embeddings")) is None:
        from vlv_model.checkpoints.loading import (
            num_positions,
        )  # transformers, which may download it

        positions = num_positions(model)
    prefix = model.num_queries
    if prefix + generate.max_new_tokens > positions:
        raise ConfigError(
            f"generate.max_new_tokens={generate.max_new_tokens}: the language model has {positions} "
            f"positions, and the image takes {prefix}: set generate.max_new_tokens to at most "
            f"{positions - prefix}"
        )


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """16 hex digits of a `caption_identity`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def as_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """A `caption_identity` by the names of the settings that decide it, to say how two differ."""
    num_queries, image_size, encoder_image_size, prompt = identity["sizes"]
    generate = {name: getattr(_USUAL, name) for name in _IN_IDENTITY} | identity["generate"]
    return {
        "model.path (weights)": identity["weights"][:12],
        "model.path (weights of its stage 1)": identity["parent"] and identity["parent"][:12],
        **{f"model.{part}": short(found) for part, found in identity["base_models"].items()},
        "model.num_queries": num_queries,
        "model.image_size": image_size,
        "model.encoder_image_size": encoder_image_size,
        "model.prompt": prompt,
        "model.preprocess": identity.get("preprocess", "default"),
        "model.bottleneck": identity.get("bottleneck", "as trained"),
        **{f"generate.{name}": value for name, value in generate.items()},
    }
