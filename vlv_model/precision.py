"""Casting a model's parameters, but not its buffers."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from vlv_model.config import Precision

M = TypeVar("M", bound=nn.Module)


def dtype_of(precision: Precision) -> torch.dtype:
    """The torch dtype of a precision."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def cast(module: M, precision: Precision) -> M:
    """Cast the floating-point parameters of `module` in place. Returns `module`.

    `module.to(dtype)` would round buffers too, such as tables of positions. In bfloat16 the
    frequencies of Qwen2.5's rotary embedding are off by up to 1/512, so an angle at position 376 by
    0.4 rad. DeepSpeed leaves buffers in float32 too.
    """
    dtype = dtype_of(precision)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return module
