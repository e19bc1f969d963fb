"""Helpers for tests of checkpoints: fake training, comparison, tampering."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.checkpoints.digests import sha256_of
from vlv_model.checkpoints.loading import resolve_model
from vlv_model.checkpoints.weights import CheckpointMetadata, read_checkpoint
from vlv_model.errors import CheckpointError


def shift(module) -> None:
    """Fake training: change every trainable tensor."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def metadata(tiny, stage="stage1", **more) -> CheckpointMetadata:
    model, _ = resolve_model(tiny)
    values = {"step": 7, "rows_seen": 112, "config": {"learning_rate": 5e-5}, "model": model}
    return CheckpointMetadata(stage=stage, **(values | more))


def same_weights(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def tamper(folder, change) -> None:
    """Rewrite the weights and update the digest."""
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(weights), path)  # clones: the file under a mapped tensor must not change
    info = json.loads((folder / "checkpoint.json").read_text())
    info["sha256"] = sha256_of(path)
    (folder / "checkpoint.json").write_text(json.dumps(info))


def relink(folder, parent) -> None:
    """Update the digest of a tampered parent in `folder`."""
    path = folder / "checkpoint.json"
    info = json.loads(path.read_text())
    info["parent"]["sha256"] = read_checkpoint(parent).sha256
    path.write_text(json.dumps(info))


def refused(folder, match, kind=VLVAutoEncoder):
    with pytest.raises(CheckpointError, match=match) as error:
        kind.from_pretrained(folder)
    assert "\n" not in str(error.value)
