"""Checkpoints of trained weights: `model.safetensors` with `checkpoint.json` beside it.

Only what was trained is written. A stage-2 checkpoint names its stage-1 parent, which holds the
queries and the caption projector, by a path relative to itself and by digest. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlv_model import loading
from vlv_model.config import Config, ModelConfig
from vlv_model.errors import CheckpointError
from vlv_model.fingerprint import fingerprint_parts, same_fingerprint, sha256_of
from vlv_model.loading import CHECKPOINT_FILE, one_line

WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1
LISTED = 4  # names in an error message


class CheckpointMetadata(Config):
    """What the trainer says about a checkpoint; the rest of checkpoint.json follows from it."""

    stage: Literal["stage1", "stage2"] = Field(description="which loss trained these weights")
    step: int = Field(ge=0, description="optimiser updates done in this stage")
    rows_seen: int = Field(ge=0, description="training rows seen in this stage, repeats counted")
    config: dict[str, Any] = Field(description="the resolved settings of the run")
    model: ModelConfig = Field(description="pretrained parts and sizes, folders absolute")
    parent: str | None = Field(None, description="checkpoint folder that this one builds upon")


class Parent(Config):
    """The checkpoint whose weights are applied first."""

    path: str = Field(description="its folder, relative to this checkpoint's folder")
    sha256: str = Field(description="digest of its weights file")


class CheckpointInfo(CheckpointMetadata):
    """The content of checkpoint.json."""

    format_version: int = Field(description="version of this layout")
    parent: Parent | None = Field(None, description="the checkpoint applied first")  # type: ignore[assignment]
    base_models: dict[str, str] = Field(description="fingerprint of each pretrained part")
    tensors: dict[str, list[int]] = Field(description="shape of each tensor in the weights file")
    sha256: str = Field(description="digest of the weights file")


def save_checkpoint(
    folder: str | os.PathLike[str],
    module: nn.Module,
    metadata: CheckpointMetadata,
    home: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the trainable weights of `module` (those that require gradients) and checkpoint.json.

    `home` is where the folder will lie in the end, where that is another place: the parent's path
    is kept relative to it. All or nothing: written beside `folder` and renamed. Raises CheckpointError when `folder`
    exists already or the parent is no checkpoint.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise CheckpointError(f"'{folder}' exists already: save each checkpoint to a new folder")
    weights = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if not weights:
        raise CheckpointError(f"{type(module).__name__} has no trainable weights to save")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(weights, temporary / WEIGHTS_FILE)
        config, _ = loading.resolve_model(metadata.model)
        info = CheckpointInfo(
            format_version=FORMAT_VERSION,
            base_models=fingerprint_parts(config, module.base_parts),
            tensors={name: list(tensor.shape) for name, tensor in weights.items()},
            sha256=sha256_of(temporary / WEIGHTS_FILE),
            **metadata.model_dump(exclude={"parent", "model"}),
            model=config,
            parent=_parent_of(Path(home or folder).absolute(), metadata.parent),
        )
        text = info.model_dump_json(indent=2)
        (temporary / CHECKPOINT_FILE).write_text(text + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide the checkpoint from other users
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already after the rename
    return folder


def read_checkpoint(folder: str | os.PathLike[str]) -> CheckpointInfo:
    """checkpoint.json of a checkpoint's folder. Raises CheckpointError when there is none."""
    path = Path(folder) / CHECKPOINT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"'{path}' has format version {version}, this program reads {FORMAT_VERSION}: "
                "use the version of the program that wrote it"
            )
        return CheckpointInfo.model_validate(content)
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"'{folder}' is no checkpoint, expected a folder with {CHECKPOINT_FILE} and "
            f"{WEIGHTS_FILE}: {one_line(problem)}"
        ) from problem


def load_checkpoint(
    folder: str | os.PathLike[str],
    module: nn.Module,
    *,
    model: ModelConfig | None = None,
    prefix: str = "",
    may_be_untrained: tuple[str, ...] = (),
) -> CheckpointInfo:
    """Load a checkpoint into `module`, its parents first, strictly. Returns its checkpoint.json.

    Every tensor must have its place and shape; a trained part comes whole or not at all; each
    of `module.new_parts`, which no pretrained model fills, must come from somewhere unless it is
    in `may_be_untrained`. `model` is what the module was built from: its parts must have the
    fingerprints of those trained upon. `prefix` stands before the module's names in the file.
    Raises CheckpointError, before anything was changed.
    """
    chain = _chain(Path(folder))
    if model is not None:
        _check_base_models(chain, fingerprint_parts(model, module.base_parts))
    weights: dict[str, Tensor] = {}
    for path, info in chain:
        tensors = _read_weights(path, info)
        _check_names(path, tensors, module, prefix)
        weights |= tensors
    filled = {name.removeprefix(prefix) for name in weights}
    for part in module.new_parts:
        if part not in may_be_untrained and not any(_in_part(name, part) for name in filled):
            raise CheckpointError(
                f"'{folder}' leaves {prefix}{part} untrained: give a checkpoint of the stage that "
                "trains it"
            )
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name.removeprefix(prefix)].copy_(tensor)
    return chain[-1][1]


def _parent_of(folder: Path, parent: str | None) -> Parent | None:
    if parent is None:
        return None
    info = read_checkpoint(parent)
    return Parent(path=os.path.relpath(Path(parent).absolute(), folder), sha256=info.sha256)


def _chain(folder: Path) -> list[tuple[Path, CheckpointInfo]]:
    """The checkpoint and all its parents, the oldest first."""
    chain = [(folder, read_checkpoint(folder))]
    while (parent := chain[0][1].parent) is not None:
        path = (chain[0][0] / parent.path).resolve()
        if any(path == known.resolve() for known, _ in chain):
            raise CheckpointError(f"'{folder}' is its own ancestor: its parent chain is a circle")
        if not path.is_dir():
            raise CheckpointError(
                f"the parent of '{chain[0][0]}' is not at '{path}': keep both at the places that "
                "they had to each other"
            )
        info = read_checkpoint(path)
        if info.sha256 != parent.sha256:
            raise CheckpointError(
                f"'{path}' is not the parent that '{chain[0][0]}' was trained upon: its weights "
                f"have digest {info.sha256[:12]}, expected {parent.sha256[:12]}"
            )
        chain.insert(0, (path, info))
    return chain


def _read_weights(folder: Path, info: CheckpointInfo) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"'{folder}' lacks {WEIGHTS_FILE}: copy the whole folder")
    digest = sha256_of(path)
    if digest != info.sha256:
        raise CheckpointError(
            f"'{path}' is damaged: its digest is {digest[:12]}, {CHECKPOINT_FILE} says "
            f"{info.sha256[:12]}: copy it again"
        )
    try:
        return load_file(path)
    except SafetensorError as problem:
        raise CheckpointError(f"'{path}' is no safetensors file: {one_line(problem)}") from problem


def _check_names(folder: Path, tensors: dict[str, Tensor], module: nn.Module, prefix: str) -> None:
    """Unexpected, missing and misshapen tensors of one checkpoint, named."""
    shapes = {prefix + name: p.shape for name, p in module.named_parameters()}
    parts = [prefix + part for part in module.trained_parts]
    trained = {name for name in shapes if any(_in_part(name, part) for part in parts)}
    present = [part for part in parts if any(_in_part(name, part) for name in tensors)]
    expected = {name for name in trained if any(_in_part(name, part) for part in present)}
    problems = {
        "unexpected": sorted(tensors.keys() - trained),
        "missing": sorted(expected - tensors.keys()),
        "of another shape": [
            f"{name} {list(tensors[name].shape)} for {list(shapes[name])}"
            for name in sorted(tensors.keys() & expected)
            if tensors[name].shape != shapes[name]
        ],
    }
    found = [
        f"{len(names)} tensors {what} ({', '.join(names[:LISTED])}{', ...' * (len(names) > LISTED)})"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(
            f"'{folder}' does not fit {type(module).__name__}: {'; '.join(found)}: "
            "give a checkpoint of this model and stage"
        )


def _in_part(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _check_base_models(chain: list[tuple[Path, CheckpointInfo]], found: dict[str, str]) -> None:
    for folder, info in chain:
        for part in info.base_models.keys() & found.keys():
            trained, here = info.base_models[part], found[part]
            if not same_fingerprint(trained, here):
                raise CheckpointError(
                    f"'{folder}' was trained upon another {part} (fingerprint {trained[:19]}, "
                    f"here {here[:19]}): use the pretrained part that it was trained upon"
                )
