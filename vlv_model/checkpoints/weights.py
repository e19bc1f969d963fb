"""Checkpoints of trained weights: saved from a module, loaded into one, merged with their parents.

Only what was trained is written, in float32; loads are strict. The files themselves are described
in `vlv_model.checkpoints.files`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlv_model.checkpoints.files import (
    WEIGHTS_FILE,
    Chain,
    CheckpointInfo,
    CheckpointMetadata,
    Parent,
    check_weights,
    open_tensors,
    read_chain,
    read_checkpoint,
    read_weights,
    shapes_in,
    write_checkpoint,
)
from vlv_model.checkpoints.fingerprint import fingerprint_like, fingerprint_parts, is_same, short
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

LISTED = 4  # names in an error message


def save_checkpoint(
    folder: str | os.PathLike[str],
    module: nn.Module,
    metadata: CheckpointMetadata,
    weights: Mapping[str, Tensor] | None = None,
    more_files: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write the trainable weights of `module` (those that require gradients), in float32.

    `weights` are those weights by name, where the module does not hold them itself: gathered from
    ZeRO-3's partitions, or the float32 masters of bfloat16 ones. `more_files` are further tensors,
    by file and name, that lie beside the weights. All or nothing. Raises CheckpointError when `folder` exists already, the parent is no checkpoint or
    the weights are not the trainable ones of `module`, whole.
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
    """Load a checkpoint into `module`, its parents first, strictly. Returns its checkpoint.json.

    Every tensor must have its place and shape; a trained part comes whole or not at all; each
    of `module.new_parts`, which no pretrained model fills, must come from somewhere unless it is
    in `may_be_untrained`. Only `module.passed_over`, parts of a stage-2 checkpoint that the module
    does not have, are left in the file. `model` is what the module was built from: its parts must
    have the fingerprints of those trained upon. `prefix` stands before the module's names in the
    file. Weights take the type of the module's. Without `verify` the digests of the files are not
    looked at: `verify_checkpoint` was called on this machine. Raises CheckpointError, before
    anything was changed unless a file cannot be read to its end.
    """
    chain = read_chain(folder)
    if model is not None:
        _check_base_models(chain, model, module.base_parts)
    found: dict[str, Any] = {}  # by name, the file of which a tensor is taken
    with ExitStack() as files:
        for path, info in chain:
            weights = check_weights(path, info) if verify else path / WEIGHTS_FILE
            file = files.enter_context(open_tensors(weights))
            shapes = shapes_in(file)
            if info.stage == "stage2":
                shapes = {n: s for n, s in shapes.items() if not _in_any(n, module.passed_over)}
            _check_names(path, shapes, module, prefix, info.lora)
            found |= dict.fromkeys(shapes, file)
        filled = {name.removeprefix(prefix) for name in found}
        for part in module.new_parts:
            if part not in may_be_untrained and not any(_in_any(name, [part]) for name in filled):
                raise CheckpointError(
                    f"'{folder}' leaves {prefix}{part} untrained: give a checkpoint of the stage "
                    "that trains it"
                )
        parameters = {name_in_file(name): p for name, p in module.named_parameters()}
        with torch.no_grad():
            for name, file in found.items():
                parameters[name.removeprefix(prefix)].copy_(file.get_tensor(name))
    return chain[-1][1]


def merge_checkpoint(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write a checkpoint to `target` that stands alone: `folder`'s weights and all its parents'.

    Where both have a tensor the child's is taken. What `folder` says about itself is kept, but for
    the parent, which is gone, and for the base models, which are those of all. Returns `target`'s absolute path; raises CheckpointError when it
    exists already or anything in the chain is missing or damaged.
    """
    chain = read_chain(folder)
    weights: dict[str, Tensor] = {}
    for path, info in chain:
        weights |= read_weights(path, info)
    own = {"format_version", "tensors", "sha256", "parent", "merged_stages", "more_files"}
    merged_stages = _stages(chain)[:-1]
    base_models: dict[str, str] = {}
    for _, info in chain:  # stage 1 knows the UNet's fingerprint, stage 2 the language model's
        base_models |= info.base_models
    about = chain[-1][1].model_dump(exclude=own)
    about |= {"merged_stages": merged_stages, "base_models": base_models}
    return write_checkpoint(target, weights, about)


def stages_of(folder: str | os.PathLike[str], *, verify: bool = True) -> list[str]:
    """Stages that trained the weights of a checkpoint and its parents, the oldest first.

    Reads every file of the chain and raises CheckpointError where one is missing or damaged, so
    that a run can be refused before any model is loaded. Without `verify` manifests alone.
    """
    chain = read_chain(folder)
    for path, info in chain if verify else []:
        check_weights(path, info)
    return _stages(chain)


def _stages(chain: Chain) -> list[str]:
    return [stage for _, info in chain for stage in (*info.merged_stages, info.stage)]


def _trainable_weights(module: nn.Module, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """float32 weights on the CPU, checked against the parameters that require gradients."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise CheckpointError(f"{type(module).__name__} has no trainable weights to save")
    weights = trainable if given is None else given
    # ZeRO-3 leaves an empty shell in a parameter's place, which still knows the whole shape.
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in trainable.items()}
    misfits = describe_misfits(shapes_of(weights), shapes)
    empty = sorted(name for name, tensor in weights.items() if tensor.numel() == 0)
    if empty:
        misfits = [*misfits, f"{len(empty)} tensors empty ({_listed(empty)})"]
    if misfits:
        raise CheckpointError(
            f"the weights to save are not the trainable ones of {type(module).__name__}: "
            f"{'; '.join(misfits)}: gather the whole tensors from all workers first"
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
    """Unexpected, missing and misshapen tensors of one checkpoint, named."""
    shapes = {prefix + name_in_file(name): p.shape for name, p in module.named_parameters()}
    shapes = {name: shape for name, shape in shapes.items() if belongs_in_file(name, lora)}
    parts = [prefix + part for part in module.trained_parts]
    present = [part for part in parts if any(_in_any(name, [part]) for name in found)]
    expected = {name: shape for name, shape in shapes.items() if _in_any(name, present)}
    if misfits := describe_misfits(found, expected):
        raise CheckpointError(
            f"'{folder}' does not fit {type(module).__name__}: {'; '.join(misfits)}: "
            "give a checkpoint of this model and stage"
        )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def describe_misfits(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> list[str]:
    """How names and shapes of tensors differ from those expected, a phrase for each way."""
    ways = {
        "unexpected": sorted(found.keys() - expected.keys()),
        "missing": sorted(expected.keys() - found.keys()),
        "of another shape": [
            f"{name} {list(found[name])} for {list(expected[name])}"
            for name in sorted(found.keys() & expected.keys())
            if list(found[name]) != list(expected[name])
        ],
    }
    return [
        f"{len(names)} tensors {way} ({_listed(names)})" for way, names in ways.items() if names
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + ", ..." * (len(names) > LISTED)


def _in_any(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _check_base_models(chain: Chain, model: ModelConfig, parts: Sequence[str]) -> None:
    # Most parts are recorded by each checkpoint of the chain, and looked at once.
    recorded = {
        (part, info.base_models[part]): folder
        for folder, info in chain
        for part in parts
        if part in info.base_models
    }
    for (part, trained), folder in recorded.items():
        source = part_source(model, part)
        if not is_same(trained, source):
            here = short(fingerprint_like(trained, source))
            raise CheckpointError(
                f"'{folder}' was trained upon another {part}: its fingerprint was {short(trained)}, "
                f"that of '{source}' is {here}: set the model's {part} to the one of that training"
            )
