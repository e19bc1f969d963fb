"""Reads checkpoint files of the published implementation safely.

Its stage 1 is a DeepSpeed checkpoint (a folder with `latest`, or the folder of one step) or a state
dict consolidated from one; its stage 2 is `model.pt`. All but safetensors are pickles: only tensors
are unpickled, anything else is rejected and not run.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from vlv_model.checkpoints.digests import sha256_of
from vlv_model.errors import CheckpointError, one_line

_STATE_DICTS = ("model.pt", "pytorch_model.bin", "model.safetensors")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MODEL_STATES = "*mp_rank_00_model_states.pt"
_OPTIMIZER_STATES = "*zero_pp_rank_*_optim_states.pt"


class _Placeholder:
    """Replaces DeepSpeed's own objects in optimiser files, so that its code is never run."""

    def __init__(self, *_: Any) -> None:
        pass


_DEEPSPEED_OBJECTS = [
    (_Placeholder, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]


@dataclass(frozen=True)
class Reference:
    """A published state dict: tensors by name, SHA-256 by file name, and the step if known."""

    tensors: dict[str, Tensor]
    digests: dict[str, str]
    step: int | None
    omits_shared: bool  # safetensors stores a tensor with several names under one of them


def read_reference(path: Path) -> Reference:
    """Read a file or folder. Raises CheckpointError unless it is a state dict of tensors."""
    try:
        return _read(path)
    except CheckpointError:
        raise
    except Exception as problem:
        # A malformed pickle, zip file, index or partition can raise anything.
        raise CheckpointError(
            f"'{path}' cannot be read as a checkpoint of the published implementation "
            f"({type(problem).__name__}: {one_line(problem)}): if it is one, copy it again"
        ) from problem


def _read(path: Path) -> Reference:
    files = _files(path)
    if any(file.name.endswith("_model_states.pt") for file in files):
        tensors = _deepspeed_weights(files)
    else:
        tensors = {}
        for file in files:
            tensors |= read_state_dict(file)
    # Prefixes of torch.compile and of data-parallel wrappers.
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Reference(
        tensors,
        {file.name: sha256_of(file) for file in files},
        _step_of(path, files[0]),
        omits_shared=files[0].suffix == ".safetensors",
    )


def _files(path: Path) -> list[Path]:
    """The files to read; for a DeepSpeed folder with weights, the optimiser files too."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"'{path}' does not exist: give a checkpoint file or folder")
    latest = path / "latest"
    if latest.is_file():
        path = path / Path(latest.read_text(encoding="utf-8").strip()).name
    for name in _INDEXES:
        if (path / name).is_file():
            index = json.loads((path / name).read_text(encoding="utf-8"))
            return [path / Path(file).name for file in sorted(set(index["weight_map"].values()))]
    for name in _STATE_DICTS:
        if (path / name).is_file():
            return [path / name]
    states = _by_rank(path.glob(_MODEL_STATES))
    if states:
        optimizers = _by_rank(path.glob(_OPTIMIZER_STATES))
        return [*states, *optimizers]
    if checkpoints := [*path.glob("checkpoint_*.pt")]:
        return [max(checkpoints, key=lambda file: (_step_of(file, file) or 0, file.name))]
    raise CheckpointError(
        f"'{path}' holds no checkpoint of the published implementation: expected model.pt, "
        "pytorch_model.bin, model.safetensors, or a DeepSpeed checkpoint "
        "(mp_rank_00_model_states.pt)"
    )


def _by_rank(files: Iterator[Path]) -> list[Path]:
    def rank(file: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)", file.name)
        return int(found[1]) if found else 0

    return sorted(files, key=rank)


def _step_of(path: Path, file: Path) -> int | None:
    for name in (file.stem, file.parent.name, path.name):
        if found := re.search(r"(?:step|checkpoint)[_-](\d+)", name):
            return int(found[1])
    return None


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises CheckpointError unless it is a state dict of tensors."""
    content = _open(file)
    if isinstance(content, dict) and "model_state_dict" in content:
        content = content["model_state_dict"]
    return _tensors(file, content)


def _tensors(file: Path, content: Any) -> dict[str, Tensor]:
    named = isinstance(content, dict) and bool(content)
    if not named or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"'{file}' is not a state dict: expected tensors by name")
    for name, value in content.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "without values" if value.is_meta else "sparse or quantised"
            raise CheckpointError(
                f"'{file}' has {name} as a tensor that is {kind}: expected a dense tensor"
            )
    return dict(content)


def _open(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with safe_globals(_DEEPSPEED_OBJECTS):
            return torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except pickle.UnpicklingError as problem:
        asked = re.search(r"(?:GLOBAL|global:) (?:GLOBAL )?([\w.]+)", str(problem))
        what = f" ('{asked[1]}')" if asked else ""
        raise CheckpointError(
            f"'{file}' is rejected: it contains an object that could run code{what}, or it is not a "
            "torch file: give a state dict of tensors only"
        ) from problem
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as problem:
        raise CheckpointError(f"'{file}' cannot be read: {one_line(problem)}") from problem


# ------------------------------------------------------------------------------------ DeepSpeed


def _deepspeed_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """The weights of a DeepSpeed checkpoint.

    If the module's weights are not float32, or are partitioned (ZeRO-3), the float32 weights come
    from the optimiser's partitions.
    """
    states = [_open(file) for file in files if file.name.endswith("_model_states.pt")]
    shards = [file for file in files if file.name.endswith("_optim_states.pt")]
    weights = _tensors(files[0], states[0].get("module"))
    partitioned = files[0].name.startswith("zero_pp_rank_")
    trained = {name for group in states[0].get("param_shapes") or () for name in group}
    rounded = any(weights[n].dtype != torch.float32 for n in trained & weights.keys())
    if not partitioned and not (rounded and shards):
        return weights
    if not shards:
        raise CheckpointError(f"'{files[0].parent}' lacks the optimiser files: copy all of it")
    parts = [_open(file)["optimizer_state_dict"] for file in shards]
    count = parts[0]["partition_count"]
    world_size = max(count) if isinstance(count, list) else count
    if world_size != len(parts) or (partitioned and world_size != len(states)):
        raise CheckpointError(
            f"'{files[0].parent}' has {len(parts)} of {world_size} partitions: copy all of them"
        )
    weights |= _zero3(states, parts) if partitioned else _zero2(states[0], parts)
    for alias, name in states[0].get("shared_params", {}).items():
        weights[alias] = weights[name]
    return weights


def _zero2(state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """ZeRO-1 and 2: each parameter group is one vector, split evenly between ranks."""
    paddings = parts[0].get("param_alignment_paddings")
    weights = {}
    for group, shapes in enumerate(state["param_shapes"]):
        vector = torch.cat([part["single_partition_of_fp32_groups"][group] for part in parts])
        offset = 0
        for i, (name, shape) in enumerate(shapes.items()):
            weights[name] = vector[offset : offset + math.prod(shape)].view(shape).detach()
            offset += math.prod(shape) + (paddings[group][i] if paddings else 0)
    return weights


def _zero3(
    states: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """ZeRO-3: each parameter is split evenly between ranks, the last part padded."""
    vectors = [torch.cat([*part["fp32_flat_groups"]]) for part in parts]
    weights, offset = {}, 0
    for name, shape in ((n, s) for group in states[0]["param_shapes"] for n, s in group.items()):
        numel = math.prod(shape)
        share = -(-numel // len(parts))
        whole = torch.cat([vector[offset : offset + share] for vector in vectors])
        weights[name] = whole[:numel].view(shape).detach()
        offset += share
    for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
        whole = torch.cat([state["frozen_param_fragments"][name].flatten() for state in states])
        weights[name] = whole[: math.prod(shape)].view(shape)
    return weights
