"""FLOPs of a training step and the peak FLOP/s of the device, for MFU.

Model FLOP utilisation (Chowdhery et al. 2022, PaLM, appendix B) divides the FLOPs that the model
needs by those that the device could do in the same time. Matrix products, convolutions and attention
count, in the forward and backward passes that run: frozen parts that pass a gradient through have no
weight gradient, and parts without a gradient have no backward pass. Recomputed activations and
padding do not count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_TOKENS = ("input_ids", "attention_mask", "labels")  # inputs `[b n]` of stage 2
_aten = torch.ops.aten


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: torch.Size, *shapes: Any, **__: Any) -> int:
    return 2 * _attention(*shapes)


# torch has no formula for the CPU kernel, and its backward formulas count the recomputed scores.
FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of the forward and backward pass."""

    per_image: float
    per_token: float = 0.0  # of a caption, end-of-text included; attention taken as linear

    def of(self, images: int, tokens: int = 0) -> float:
        return images * self.per_image + tokens * self.per_token


def count_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> Flops:
    """Count the FLOPs of `model(**inputs)`, a loss, on the first row of `inputs`.

    Runs the model once; in stage 2 twice, with the whole caption and with its first token. The model
    must have no activation checkpointing, DeepSpeed hooks or compiled parts. Afterwards its gradients
    are empty and its mode is unchanged. Each weight's gradient is freed at once: all together take as
    much memory as the weights, which DeepSpeed would partition.
    """
    row = {name: value[:1] for name, value in inputs.items()}
    if "labels" not in row:
        return Flops(_count(model, row))
    length = int((row["labels"] >= 0).sum())
    whole, shortest = (_count(model, _cut(row, tokens)) for tokens in (length, 1))
    per_token = (whole - shortest) / max(1, length - 1)
    return Flops(shortest - per_token, per_token)


def matrix_rate(device: torch.device, seconds: float = 0.1) -> float:
    """Measure this device's FLOP/s on large square matrix products.

    bfloat16 on CUDA, whatever the run's precision; float32 on CPUs, where other processes on the same
    cores make it a rough estimate.
    """
    on_cuda = device.type == "cuda"
    side = 8_192 if on_cuda else 1_024
    dtype = torch.bfloat16 if on_cuda else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # keeps the run's random state
    left, right = (torch.randn(side, side, device=device, generator=generator) for _ in range(2))
    left, right = left.to(dtype), right.to(dtype)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        best = min(best, _product_seconds(left, right, times=10 if on_cuda else 1))
    return 2 * side**3 / best


def _product_seconds(left: Tensor, right: Tensor, times: int) -> float:
    synchronize(left.device)
    start = time.perf_counter()
    for _ in range(times):
        left @ right
    synchronize(left.device)
    return (time.perf_counter() - start) / times


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device's queued work; nothing to do on CPUs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cut(row: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    return {name: v[:, :tokens] if name in _TOKENS else v for name, v in row.items()}


def _count(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    was_training = model.training
    model.eval()
    hooks = [
        parameter.register_post_accumulate_grad_hook(forget_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            model(**inputs).backward()
    finally:
        for hook in hooks:
            hook.remove()
    model.train(was_training)
    return float(counter.get_total_flops())


def forget_gradient(parameter: Tensor) -> None:
    """Free a gradient; a hook for `register_post_accumulate_grad_hook`."""
    parameter.grad = None
