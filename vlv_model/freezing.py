"""Freezing that lasts: a frozen part gets no gradient and never enters train mode.

`model.train()` sets the mode of every submodule. On a frozen vision tower that would switch on
drop-path (0.1 in DaViT), on a frozen text encoder dropout. So the `train()` of a frozen module, and
of every module inside it, does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def freeze(module: nn.Module) -> nn.Module:
    """Stop gradients to `module`'s parameters and keep it in eval mode. Returns `module`."""
    module.requires_grad_(False)
    for part in module.modules():
        part.training = False
        # Set on each instance, so train() does nothing whether a parent, the module or a submodule
        # is the one it is called on. A partial of a named function survives pickle and deepcopy.
        part.train = partial(_stay_in_eval, part)
    return module


def thaw(module: nn.Module) -> nn.Module:
    """Undo `freeze`; the module stays in eval mode until the next `train()`. Returns `module`."""
    module.requires_grad_(True)
    for part in module.modules():
        part.__dict__.pop("train", None)
    return module


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of `module` gets a gradient and no submodule can enter train mode."""
    return not any(p.requires_grad for p in module.parameters()) and all(
        "train" in part.__dict__ for part in module.modules()
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block without gradients and in eval mode, then restore the mode."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
