"""Freezing that holds: a frozen part takes no gradient and never enters train mode.

`model.train()` sets the mode of every module below it. On a frozen vision tower that would switch
drop-path on (0.1 in DaViT), on a frozen text encoder dropout: the targets would become noise. So
a frozen module gets a `train()` that does nothing, and so does every module inside it.
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
    """Stop gradients into `module`'s parameters and hold it in eval mode. Returns `module`."""
    module.requires_grad_(False)
    for part in module.modules():
        part.training = False
        # On the instance, so that train() called on a parent, on the module itself or on any
        # module inside it ends here; a partial of a named function survives pickle and deepcopy.
        part.train = partial(_stay_in_eval, part)
    return module


def thaw(module: nn.Module) -> nn.Module:
    """Undo `freeze`; the parts are in eval mode until the next `train()`. Returns `module`."""
    module.requires_grad_(True)
    for part in module.modules():
        part.__dict__.pop("train", None)
    return module


def is_frozen(module: nn.Module) -> bool:
    """True when no parameter of `module` takes a gradient and no part of it can enter train mode."""
    return not any(p.requires_grad for p in module.parameters()) and all(
        "train" in part.__dict__ for part in module.modules()
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block without gradients and in eval mode; the mode it had comes back afterwards."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
