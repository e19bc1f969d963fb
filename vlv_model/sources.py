"""Which pretrained parts and which checkpoint a model is opened from, without loading any.

A ModelConfig, a model folder or a checkpoint comes in, with single parts named beside it; folders
come out absolute, hub ids as they are.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from pydantic import ValidationError

from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, ModelError, one_line

CHECKPOINT_FILE = "checkpoint.json"
MODEL_FILE = "model.json"
DIFFUSION_PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Model = ModelConfig | str | os.PathLike[str]


def resolve_model(model: Model) -> tuple[ModelConfig, Path | None]:
    """The ModelConfig that `model` stands for, and the checkpoint folder if it is one.

    `model` is a ModelConfig, a folder with `model.json` (a ModelConfig whose paths are relative to
    that folder) or a folder with `checkpoint.json` (its `model` section, all paths absolute).
    Local folders come back absolute, hub ids as they are. Raises ModelError or CheckpointError.
    """
    if isinstance(model, ModelConfig):
        return _with_absolute_folders(model, Path.cwd()), None
    folder = Path(model)
    if (folder / CHECKPOINT_FILE).is_file():
        path = folder / CHECKPOINT_FILE
    elif (folder / MODEL_FILE).is_file():
        path = folder / MODEL_FILE
    else:
        raise ModelError(
            f"'{folder}' holds neither {CHECKPOINT_FILE} nor {MODEL_FILE}: give a checkpoint's "
            "folder, a model folder such as vlv_model.tiny writes, or a ModelConfig"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = ModelConfig.model_validate(
            content["model"] if path.name == CHECKPOINT_FILE else content
        )
    except (ValueError, KeyError, TypeError) as problem:
        error = CheckpointError if path.name == CHECKPOINT_FILE else ModelError
        raise error(f"'{path}' cannot be read as a model: {one_line(problem)}") from problem
    config = _with_absolute_folders(config, folder.resolve())
    return config, folder if path.name == CHECKPOINT_FILE else None


def resolve_checkpoint(
    model: Model | None,
    checkpoint: str | os.PathLike[str] | None = None,
    parts: Mapping[str, Any] | None = None,
) -> tuple[ModelConfig, Path | None]:
    """What `from_pretrained` opens: the ModelConfig, and the checkpoint's folder or None.

    Without `model` it is the checkpoint's own, or ModelConfig's defaults where there is no
    checkpoint either. `parts` are fields of ModelConfig that win over the model's. The checkpoint
    is named apart or found in `model`. Raises ModelError for an unknown or unfit part, and
    CheckpointError for two different checkpoints.
    """
    if model is None:
        model = ModelConfig() if checkpoint is None else checkpoint
    config, found = resolve_model(model)
    if (
        checkpoint is not None
        and found is not None
        and found.resolve() != Path(checkpoint).resolve()
    ):
        raise CheckpointError(
            f"two checkpoints: '{found}' as the model and '{checkpoint}': give one of them"
        )
    return _with_parts(config, parts or {}), found if checkpoint is None else Path(checkpoint)


def part_source(config: ModelConfig, part: str) -> tuple[str, str]:
    """Folder or hub id of a part, and the subfolder in it ("" for none).

    `part` is `florence`, `language_model`, `vae`, `unet`, `text_encoder`, `tokenizer` or
    `scheduler`. Raises ModelError when a local folder does not exist.
    """
    own: str | None = getattr(config, part)
    if own is not None:
        source, subfolder = own, ""
    else:
        source, subfolder = config.diffusion, part
    path = Path(source, subfolder)
    if not path.is_dir() and (Path(source).is_dir() or not _HUB_ID.fullmatch(source)):
        raise ModelError(
            f"{part}: there is no folder '{path}', and '{source}' is no hub id (owner/name): "
            f"set the model's '{part if own else 'diffusion'}' to a pretrained folder or hub id"
        )
    return source, subfolder


def local_folder(source: str) -> Path | None:
    """The folder of a local or cached pretrained part; None for a hub id that is not cached."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _with_absolute_folders(config: ModelConfig, base: Path) -> ModelConfig:
    def absolute(value: str) -> str:
        path = Path(base, value).expanduser()
        return str(path.resolve()) if path.exists() or not _HUB_ID.fullmatch(value) else value

    named = ("florence", "diffusion", *DIFFUSION_PARTS, "language_model")
    values = {name: getattr(config, name) for name in named}
    return config.model_copy(
        update={name: absolute(value) for name, value in values.items() if value is not None}
    )


def _with_parts(config: ModelConfig, parts: Mapping[str, Any]) -> ModelConfig:
    if not parts:
        return config
    known = list(ModelConfig.model_fields)
    for name in parts:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known)}"
            raise ModelError(f"a model has no part or size '{name}': {hint}")
    given = {n: os.fspath(v) if isinstance(v, os.PathLike) else v for n, v in parts.items()}
    try:
        merged = ModelConfig(**({name: getattr(config, name) for name in known} | given))
    except ValidationError as problem:
        raise ModelError(f"these parts make no model: {one_line(problem)}") from problem
    return _with_absolute_folders(merged, Path.cwd())
