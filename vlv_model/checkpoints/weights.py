"""Saves a module's trained weights, loads them, merges a checkpoint with its parents.

Only trained weights are saved, in float32; loading is strict. For the files see
`vlv_model.checkpoints.files`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlv_model.checkpoints.digests import (
    fingerprint_like,
    fingerprint_parts,
    matches_fingerprint,
    short,
)
from vlv_model.checkpoints.files import (
    WEIGHTS_FILE,
    Chain,
    CheckpointInfo,
    CheckpointMetadata,
    Parent,
    chain_stages,
    check_weights,
    open_tensors,
    read_chain,
    read_checkpoint,
    read_weights,
    shapes_in,
    stages_of,
    write_checkpoint,
)
from vlv_model.checkpoints.sources import part_source, resolve_model
from vlv_model.config import Lora, ModelConfig
from vlv_model.errors import CheckpointError
from vlv_model.lora import belongs_in_file, name_in_file

__all__ = [
    "CheckpointInfo",
    "CheckpointMetadata",
    "load_checkpoint",
    "merge_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "stages_of",
]

_MAX_LISTED = 4  # names in an error message


def save_checkpoint(
    folder: str | os.PathLike[str],
    module: nn.Module,
    metadata: CheckpointMetadata,
    weights: Mapping[str, Tensor] | None = None,
    more_files: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write the weights of `module` that require gradients, in float32, atomically.

    `weights` replaces the module's own: weights gathered from ZeRO-3's partitions, or the float32
    master copies of bfloat16 weights. `more_files` are further tensors by file and name. Returns
    the absolute path. Raises CheckpointError when `folder` already exists, the parent is not a
    checkpoint, or `weights` are not the complete trainable weights of `module`.
    """
    weights = _trainable_weights(module, weights)
    config, _ = resolve_model(metadata.model)
    about = {
        **metadata.model_dump(exclude={"parent", "model"}),
        "model": config,
        "base_models": fingerprint_parts(config, module.base_parts),
        "parent": _parent_of(Path(folder).absolute(), metadata.parent),
        "lora": getattr(module, "lora", Lora()),
    }
    return write_checkpoint(folder, weights, about, more_files)


def load_checkpoint(
    folder: str | os.PathLike[str],
    module: nn.Module,
    *,
    model: ModelConfig | None = None,
    prefix: str = "",
    may_be_untrained: tuple[str, ...] = (),
    verify: bool = True,
) -> CheckpointInfo:
    """Load a checkpoint into `module` strictly, its parents first. Returns its checkpoint.json.

    Names and shapes must match, and a trained part must be complete or absent. Each of
    `module.new_parts`, which no pretrained model has, must be in the chain unless it is in
    `may_be_untrained`. `module.ignored_parts`, parts of a stage-2 checkpoint that the module does
    not have, are skipped.

    `model` is what the module was built from: its parts must have the recorded fingerprints.
    `prefix` precedes the module's names in the file. Weights are cast to the module's dtypes.
    `verify=False` skips the digest checks, after `verify_checkpoint` on this machine. Raises
    CheckpointError; the module is then unchanged, unless reading a tensor failed.
    """
    chain = read_chain(folder)
    if model is not None:
        _check_base_models(chain, model, module.base_parts)
    file_of: dict[str, Any] = {}  # by tensor name, the open file to read it from
    with ExitStack() as files:
        for path, info in chain:
            weights = check_weights(path, info) if verify else path / WEIGHTS_FILE
            file = files.enter_context(open_tensors(weights))
            shapes = shapes_in(file)
            if info.stage == "stage2":
                shapes = {n: s for n, s in shapes.items() if not _in_any(n, module.ignored_parts)}
            _check_names(path, shapes, module, prefix, info.lora)
            file_of |= dict.fromkeys(shapes, file)
        names = {name.removeprefix(prefix) for name in file_of}
        for part in module.new_parts:
            if part not in may_be_untrained and not any(_in_any(name, [part]) for name in names):
                raise CheckpointError(
                    f"'{folder}' leaves {prefix}{part} untrained: give a checkpoint of the stage "
                    "that trains it"
                )
        parameters = {name_in_file(name): p for name, p in module.named_parameters()}
        with torch.no_grad():
            for name, file in file_of.items():
                parameters[name.removeprefix(prefix)].copy_(file.get_tensor(name))
    return chain[-1][1]


def merge_checkpoint(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write `folder`'s weights and all its parents' to `target`, a checkpoint without a parent.

    A tensor of the child replaces the parent's. The manifest is the child's, with the base models
    of the whole chain. Returns `target`'s absolute path. Raises CheckpointError when it already
    exists or anything in the chain is missing or damaged.
    """
    chain = read_chain(folder)
    weights: dict[str, Tensor] = {}
    for path, info in chain:
        weights |= read_weights(path, info)
    rewritten = {"format_version", "tensors", "sha256", "parent", "merged_stages", "more_files"}
    merged_stages = chain_stages(chain)[:-1]
    base_models: dict[str, str] = {}
    for _, info in chain:  # stage 1 has the UNet's fingerprint, stage 2 the language model's
        base_models |= info.base_models
    about = chain[-1][1].model_dump(exclude=rewritten)
    about |= {"merged_stages": merged_stages, "base_models": base_models}
    return write_checkpoint(target, weights, about)


def _trainable_weights(module: nn.Module, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """float32 weights on the CPU, checked against the parameters that require gradients."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise CheckpointError(f"{type(module).__name__} has no trainable weights to save")
    weights = trainable if given is None else given
    # ZeRO-3 replaces a parameter by an empty tensor; ds_shape is the full shape.
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in trainable.items()}
    mismatches = describe_mismatches(shapes_of(weights), shapes)
    empty = sorted(name for name, tensor in weights.items() if tensor.numel() == 0)
    if empty:
        mismatches = [*mismatches, f"{len(empty)} tensors empty ({_listed(empty)})"]
    if mismatches:
        raise CheckpointError(
            f"the weights to save are not the trainable ones of {type(module).__name__}: "
            f"{'; '.join(mismatches)}: gather the whole tensors from all workers first"
        )
    return {n: t.detach().to("cpu", torch.float32).contiguous() for n, t in weights.items()}


def _parent_of(folder: Path, parent: str | None) -> Parent | None:
    if parent is None:
        return None
    info = read_checkpoint(parent)
    return Parent(path=os.path.relpath(Path(parent).absolute(), folder), sha256=info.sha256)


def _check_names(
    folder: Path,
    found: Mapping[str, Sequence[int]],
    module: nn.Module,
    prefix: str,
    lora: Lora,
) -> None:
    """Raise CheckpointError that names unexpected, missing and misshapen tensors."""
    shapes = {prefix + name_in_file(name): p.shape for name, p in module.named_parameters()}
    shapes = {name: shape for name, shape in shapes.items() if belongs_in_file(name, lora)}
    parts = [prefix + part for part in module.trained_parts]
    present = [part for part in parts if any(_in_any(name, [part]) for name in found)]
    expected = {name: shape for name, shape in shapes.items() if _in_any(name, present)}
    if mismatches := describe_mismatches(found, expected):
        raise CheckpointError(
            f"'{folder}' does not fit {type(module).__name__}: {'; '.join(mismatches)}: "
            "give a checkpoint of this model and stage"
        )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    """The shape of each tensor, by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def describe_mismatches(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> list[str]:
    """How names and shapes of tensors differ from the expected ones: one phrase per kind."""
    kinds = {
        "unexpected": sorted(found.keys() - expected.keys()),
        "missing": sorted(expected.keys() - found.keys()),
        "of another shape": [
            f"{name} {list(found[name])} for {list(expected[name])}"
            for name in sorted(found.keys() & expected.keys())
            if list(found[name]) != list(expected[name])
        ],
    }
    return [
        f"{len(names)} tensors {kind} ({_listed(names)})" for kind, names in kinds.items() if names
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + ", ..." * (len(names) > _MAX_LISTED)


def _in_any(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _check_base_models(chain: Chain, model: ModelConfig, parts: Sequence[str]) -> None:
    # Most parts are recorded by each checkpoint of the chain; each is checked once.
    recorded = {
        (part, info.base_models[part]): folder
        for folder, info in chain
        for part in parts
        if part in info.base_models
    }
    for (part, trained), folder in recorded.items():
        source = part_source(model, part)
        if not matches_fingerprint(trained, source):
            current = short(fingerprint_like(trained, source))
            raise CheckpointError(
                f"'{folder}' was trained with another {part}: its fingerprint was {short(trained)}, "
                f"that of '{source}' is {current}: set the model's {part} to the one of that run"
            )
