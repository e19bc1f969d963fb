"""The VLV auto-encoder (arXiv 2507.07104): encoder, auto-encoder (stage 1), captioner (stage 2)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlv_model.config import ModelConfig
from vlv_model.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RunError,
    VLVError,
)

if TYPE_CHECKING:
    from vlv_model.autoencoder import VLVAutoEncoder
    from vlv_model.captioner import VLVCaptioner
    from vlv_model.encoder import VLVEncoder

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ModelConfig",
    "ModelError",
    "RunError",
    "VLVAutoEncoder",
    "VLVCaptioner",
    "VLVEncoder",
    "VLVError",
]


# Imported on first access: the models import transformers and diffusers, which takes seconds, and
# code that needs only a setting or an error should not wait for that.
_MODELS = {
    "VLVAutoEncoder": "vlv_model.autoencoder",
    "VLVCaptioner": "vlv_model.captioner",
    "VLVEncoder": "vlv_model.encoder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODELS[name]), name)
