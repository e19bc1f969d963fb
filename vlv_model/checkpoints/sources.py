"""Resolves which pretrained parts and which checkpoint a model is loaded from. Loads nothing.

The input is a ModelConfig, a model folder or a checkpoint, with single parts overridden. The result
has absolute folders and unchanged hub ids; `pin` adds the commit to hub ids.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlv_model.checkpoints.hub import HubId, why_unreachable
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, ModelError, one_line

CHECKPOINT_FILE = "checkpoint.json"
MODEL_FILE = "model.json"
DIFFUSION_PARTS = (
    "vae",
    "unet",
    "transformer",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)
# The fields of ModelConfig that name a folder or hub id.
SOURCE_FIELDS = ("florence", "diffusion", *DIFFUSION_PARTS, "language_model")

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
            f"'{folder}' has neither {CHECKPOINT_FILE} nor {MODEL_FILE}: give a checkpoint folder, "
            "a model folder such as vlv_model.tiny writes, or a ModelConfig"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = ModelConfig.model_validate(
            content["model"] if path.name == CHECKPOINT_FILE else content
        )
    except (ValueError, KeyError, TypeError) as problem:
        error = CheckpointError if path.name == CHECKPOINT_FILE else ModelError
        raise error(f"cannot read a model from '{path}': {one_line(problem)}") from problem
    config = _with_absolute_folders(config, folder.resolve())
    return config, folder if path.name == CHECKPOINT_FILE else None


def resolve_checkpoint(
    model: Model | None,
    checkpoint: str | os.PathLike[str] | None = None,
    parts: Mapping[str, Any] | None = None,
) -> tuple[ModelConfig, Path | None]:
    """What `from_pretrained` loads: the ModelConfig, and the checkpoint folder or None.

    `model` defaults to the checkpoint's own, or to ModelConfig() without a checkpoint. `parts` are
    fields of ModelConfig that override the model's. The checkpoint is `checkpoint`, or `model` if
    that is one. Raises ModelError for an unknown or invalid part, and CheckpointError for two
    different checkpoints.
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
            f"two checkpoints: '{found}' as the model and '{checkpoint}': give only one"
        )
    return _with_parts(config, parts or {}), found if checkpoint is None else Path(checkpoint)


@dataclass(frozen=True)
class Source:
    """Where a pretrained part is loaded from: a folder or hub repository, and a subfolder."""

    location: Path | HubId
    subfolder: str = ""

    def __str__(self) -> str:
        return f"{self.location}/{self.subfolder}" if self.subfolder else str(self.location)

    @property
    def name(self) -> str:
        """Folder or repository, the first argument of `from_pretrained`."""
        return self.location.repo if isinstance(self.location, HubId) else str(self.location)

    @property
    def load_kwargs(self) -> dict[str, str]:
        """Further arguments of `from_pretrained`: subfolder and revision."""
        kwargs = {"subfolder": self.subfolder}
        if isinstance(self.location, HubId) and self.location.revision:
            kwargs["revision"] = self.location.revision
        return kwargs

    @property
    def repo(self) -> str | None:
        """The hub repository; None for a folder."""
        return self.location.repo if isinstance(self.location, HubId) else None

    def may_match(self, recorded: str) -> bool:
        """Whether a recorded field of ModelConfig can name the same source, judged by names."""
        before = HubId.parse(recorded)
        if not isinstance(self.location, HubId):
            # Older versions recorded relative folders.
            return Path(recorded).absolute() == self.location.absolute()
        if before is None:
            return False
        revisions = {before.revision, self.location.revision} - {None}
        return before.repo == self.location.repo and len(revisions) < 2

    def folder(self) -> Path | None:
        """The files on this machine, perhaps incomplete; None if nothing was downloaded."""
        base = self.location.snapshot() if isinstance(self.location, HubId) else self.location
        return None if base is None else base / self.subfolder


def field_of(config: ModelConfig, part: str) -> str:
    """The field of ModelConfig that names a part's source: its own, or `diffusion`."""
    return part if getattr(config, part) is not None else "diffusion"


def part_source(config: ModelConfig, part: str) -> Source:
    """Where a part is loaded from.

    `part` is `florence`, `language_model` or one of DIFFUSION_PARTS. Raises ModelError when a local
    folder does not exist.
    """
    field = field_of(config, part)
    value, subfolder = getattr(config, field), "" if field == part else part
    return source_of(value, part, f"the model's '{field}'", subfolder)


def source_of(value: str, part: str, setting: str, subfolder: str = "") -> Source:
    """The source that a folder or hub id names; ModelError, beginning with `part`, if it is neither."""
    path = Path(value, subfolder)
    if path.is_dir():
        return Source(Path(value), subfolder)
    if (hub_id := _hub_id(value)) is None:
        raise ModelError(
            f"{part}: there is no folder '{path}', and '{value}' is not a hub id (owner/name or "
            f"owner/name@revision): set {setting} to a pretrained folder or hub id"
        )
    return Source(hub_id, subfolder)


def _hub_id(value: str) -> HubId | None:
    """The hub id in a field of ModelConfig; None for an existing folder."""
    return None if Path(value).is_dir() else HubId.parse(value)


def pin(
    config: ModelConfig, parts: Iterable[str], known: Mapping[str, str] | None = None
) -> ModelConfig:
    """`config` with the hub ids of `parts` pinned to a commit: `owner/name@commit`.

    So all processes of a job read the same files, even after a push to the repository. `known` are
    the pinned ids of an earlier attempt, by field: an id without a revision gets the same commit
    again. Raises ModelError when neither the hub nor the local cache has an id.
    """
    pinned = {}
    unreachable = cache(why_unreachable)  # asked once, and only if an id has no commit yet
    for field in sorted({field_of(config, part) for part in parts}):
        if (hub_id := _hub_id(getattr(config, field))) is None:
            continue
        before = HubId.parse((known or {}).get(field) or "")
        if before and before.commit and before.repo == hub_id.repo and not hub_id.revision:
            hub_id = before
        try:
            pinned[field] = str(hub_id.pinned(None if hub_id.commit else unreachable()))
        except ModelError as problem:
            raise ModelError(f"{field}: {problem}") from problem
    return config.model_copy(update=pinned)


def _with_absolute_folders(config: ModelConfig, base: Path) -> ModelConfig:
    def absolute(value: str) -> str:
        path = Path(base, value).expanduser()
        return str(path.resolve()) if path.exists() or not HubId.parse(value) else value

    values = {name: getattr(config, name) for name in SOURCE_FIELDS}
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
            raise ModelError(f"unknown model setting '{name}': {hint}")
    given = {n: os.fspath(v) if isinstance(v, os.PathLike) else v for n, v in parts.items()}
    try:
        merged = ModelConfig(**({name: getattr(config, name) for name in known} | given))
    except ValidationError as problem:
        raise ModelError(f"invalid model settings: {one_line(problem)}") from problem
    return _with_absolute_folders(merged, Path.cwd())
