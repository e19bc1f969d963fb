"""Which pretrained parts and which checkpoint a model is opened from, without loading any.

A ModelConfig, a model folder or a checkpoint comes in, with single parts named beside it; folders
come out absolute, hub ids as they are, or at one commit where `pin` was asked.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlv_model.checkpoints.hub import HubId
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, ModelError, one_line

CHECKPOINT_FILE = "checkpoint.json"
MODEL_FILE = "model.json"
DIFFUSION_PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
# The fields of ModelConfig that say where something is read from.
PLACES = ("florence", "diffusion", *DIFFUSION_PARTS, "language_model")

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


@dataclass(frozen=True)
class Source:
    """Where a pretrained part is read from: a folder or a repository of the hub, and where in it."""

    place: Path | HubId
    subfolder: str = ""

    def __str__(self) -> str:
        return f"{self.place}/{self.subfolder}" if self.subfolder else str(self.place)

    @property
    def name(self) -> str:
        """Folder or repository, as `from_pretrained` takes it."""
        return self.place.repo if isinstance(self.place, HubId) else str(self.place)

    @property
    def where(self) -> dict[str, str]:
        """What `from_pretrained` has to be told beside the name."""
        where = {"subfolder": self.subfolder}
        if isinstance(self.place, HubId) and self.place.revision:
            where["revision"] = self.place.revision
        return where

    @property
    def repo(self) -> str | None:
        """The repository of the hub that it is read from."""
        return self.place.repo if isinstance(self.place, HubId) else None

    def may_be(self, recorded: str) -> bool:
        """Whether it is what a field of ModelConfig was, as far as names tell."""
        before = HubId.parse(recorded)
        if not isinstance(self.place, HubId):
            # Folders were recorded as they were given once.
            return Path(recorded).absolute() == self.place.absolute()
        if before is None:
            return False
        revisions = {before.revision, self.place.revision} - {None}
        return before.repo == self.place.repo and len(revisions) < 2

    def folder(self) -> Path | None:
        """Its files on this machine, which may not be all; None of what was never downloaded."""
        base = self.place.snapshot() if isinstance(self.place, HubId) else self.place
        return None if base is None else base / self.subfolder


def field_of(config: ModelConfig, part: str) -> str:
    """The field of ModelConfig that says where a part is: its own, or `diffusion`."""
    return part if getattr(config, part) is not None else "diffusion"


def part_source(config: ModelConfig, part: str) -> Source:
    """Where a part is read from.

    `part` is `florence`, `language_model`, `vae`, `unet`, `text_encoder`, `tokenizer` or
    `scheduler`. Raises ModelError when a local folder does not exist.
    """
    field = field_of(config, part)
    place, subfolder = getattr(config, field), "" if field == part else part
    path = Path(place, subfolder)
    if path.is_dir():
        return Source(Path(place), subfolder)
    if (hub_id := _hub_id(place)) is None:
        raise ModelError(
            f"{part}: there is no folder '{path}', and '{place}' is no hub id (owner/name or "
            f"owner/name@revision): set the model's '{field}' to a pretrained folder or hub id"
        )
    return Source(hub_id, subfolder)


def _hub_id(place: str) -> HubId | None:
    """None for a folder that is there, and for what is no hub id."""
    return None if Path(place).is_dir() else HubId.parse(place)


def pin(
    config: ModelConfig, parts: Iterable[str], known: Mapping[str, str] | None = None
) -> ModelConfig:
    """`config` with a commit in each hub id that `parts` are read from: `owner/name@commit`.

    So all processes of a job read the same files, also after somebody has pushed to the repository.
    `known` are the ids that an earlier attempt got, by field: an id without a revision gets the
    same commit again. Raises ModelError where neither the hub nor its cache knows an id.
    """
    pinned = {}
    for field in {field_of(config, part) for part in parts}:
        if (hub_id := _hub_id(getattr(config, field))) is None:
            continue
        before = HubId.parse((known or {}).get(field) or "")
        if before and before.commit and before.repo == hub_id.repo and not hub_id.revision:
            hub_id = before
        try:
            pinned[field] = str(hub_id.pinned())
        except ModelError as problem:
            raise ModelError(f"{field}: {problem}") from problem
    return config.model_copy(update=pinned)


def _with_absolute_folders(config: ModelConfig, base: Path) -> ModelConfig:
    def absolute(value: str) -> str:
        path = Path(base, value).expanduser()
        return str(path.resolve()) if path.exists() or not HubId.parse(value) else value

    values = {name: getattr(config, name) for name in PLACES}
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
