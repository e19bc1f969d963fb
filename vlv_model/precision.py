"""In what numbers a model calculates: weights are rounded, and what was computed for them is not."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from vlv_model.config import Precision

M = TypeVar("M", bound=nn.Module)


def dtype_of(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def cast(module: M, precision: Precision) -> M:
    """Have the floating-point parameters of `module` in `precision`, in place. Returns `module`.

    Buffers stay as they were computed, which `module.to(dtype)` would round too: tables that
    angles and embeddings of positions are taken from. Rounded to bfloat16, the frequencies of
    Qwen2.5's rotary embedding are off by up to 1/512, so an angle at position 376 by 0.4 rad.
    DeepSpeed keeps them so in training.
    """
    dtype = dtype_of(precision)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return module
