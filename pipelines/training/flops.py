"""How much arithmetic an update needs, and how much of it the device could do: MFU.

Model FLOP utilisation (Chowdhery et al. 2022, PaLM, appendix B): the operations that the model
needs, over those that the device does in the same time. Counted are matrix products, convolutions
and attention of forward and backward as they are run: of frozen parts that pass a gradient on
forward and gradient of the activations, of parts without a gradient forward alone. What activation
checkpointing computes again and what padding costs is not needed, and does not count.
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


# Where torch's own formulas miss the CPU's kernel, or count the scores that backward recomputes.
_FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward that an update needs."""

    per_image: float
    per_token: float = 0.0  # of a caption, end-of-text counted; its attention taken as linear

    def of(self, images: int, tokens: int = 0) -> float:
        return images * self.per_image + tokens * self.per_token


def count_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> Flops:
    """Count them on the first row of `inputs`, for which `model(**inputs)` is a loss.

    Runs it once, in stage 2 twice: with the whole caption and with its first token. The model has to
    be a plain one, without activation checkpointing, an engine's hooks or compiled parts; its
    gradients are empty afterwards and its mode is what it was. No two gradients of weights are
    there at a time: all together they would be as large as the weights, where later DeepSpeed
    shares them out.
    """
    row = {name: value[:1] for name, value in inputs.items()}
    if "labels" not in row:
        return Flops(_run(model, row))
    length = int((row["labels"] >= 0).sum())
    whole, shortest = (_run(model, _cut(row, tokens)) for tokens in (length, 1))
    per_token = (whole - shortest) / max(1, length - 1)
    return Flops(shortest - per_token, per_token)


def matrix_rate(device: torch.device, seconds: float = 0.1) -> float:
    """FLOP/s of this device on large square matrices of random numbers, as measured.

    bfloat16 on CUDA, whatever a run computes in: that is what the device could do. float32 on CPUs,
    where other processes on the same cores make it a guess.
    """
    on_cuda = device.type == "cuda"
    side = 8_192 if on_cuda else 1_024
    dtype = torch.bfloat16 if on_cuda else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # the run's own draws stay as they are
    left, right = (torch.randn(side, side, device=device, generator=generator) for _ in range(2))
    left, right = left.to(dtype), right.to(dtype)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        best = min(best, _product_seconds(left, right, times=10 if on_cuda else 1))
    return 2 * side**3 / best


def _product_seconds(left: Tensor, right: Tensor, times: int) -> float:
    synchronize(left.device)
    begun = time.perf_counter()
    for _ in range(times):
        left @ right
    synchronize(left.device)
    return (time.perf_counter() - begun) / times


def synchronize(device: torch.device) -> None:
    """Wait for what a CUDA device was given to do; CPUs do it at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cut(row: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    return {name: v[:, :tokens] if name in _TOKENS else v for name, v in row.items()}


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    was_training = model.training
    model.eval()
    hooks = [
        parameter.register_post_accumulate_grad_hook(forget_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            model(**inputs).backward()
    finally:
        for hook in hooks:
            hook.remove()
    model.train(was_training)
    return float(counter.get_total_flops())


def forget_gradient(parameter: Tensor) -> None:
    """A hook for `register_post_accumulate_grad_hook`."""
    parameter.grad = None
