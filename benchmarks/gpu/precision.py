"""bfloat16 against float32: losses, gradients and captions of the same weights and batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.setting import Setting
from benchmarks.training.steps import StageName, batch_of, our_stage
from pipelines.training.stages import Stage
from vlv_model.captioner import VLVCaptioner
from vlv_model.precision import cast

_TOKENS = 32


def stage1(setting: Setting) -> dict[str, Any]:
    """Loss and gradients of stage 1."""
    return _compare(setting, "stage1")


def stage2(setting: Setting) -> dict[str, Any]:
    """Loss and gradients of stage 2, and greedy captions."""
    return _compare(setting, "stage2")


def _compare(setting: Setting, name: StageName) -> dict[str, Any]:
    stage = our_stage(setting.size, name, setting.device, kept=False)
    stage.model.eval()  # no dropout
    prepared = stage.prepare(batch_of(setting.size, name))
    inputs = {key: value.to(setting.device) for key, value in prepared.inputs.items()}
    losses, gradients, captions = {}, {}, {}
    for precision in ("float32", "bfloat16"):
        cast(stage.model, precision)
        losses[precision], gradients[precision] = _loss_and_gradients(stage, inputs)
        if isinstance(stage.model, VLVCaptioner):
            squares = prepared.inputs["pixel_values"].to(setting.device)
            written = stage.model.generate(squares, max_new_tokens=_TOKENS)
            captions[precision] = [caption.text for caption in written]
    exact, rounded = losses["float32"], losses["bfloat16"]
    figures = {
        "float32_loss": exact,
        "bfloat16_loss": rounded,
        "loss_difference": abs(rounded - exact) / abs(exact),
        "gradient_cosine": _cosine(gradients["float32"], gradients["bfloat16"]),
    }
    if captions:
        pairs = list(zip(*captions.values(), strict=True))
        figures["equal_captions"] = sum(one == other for one, other in pairs) / len(pairs)
    return figures


def _loss_and_gradients(stage: Stage, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients in bfloat16, so that those of both precisions fit into memory."""
    loss = stage.model(**inputs)
    loss.backward()
    gradients = {}
    for name, parameter in stage.model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.bfloat16()
            parameter.grad = None
    return float(loss.detach()), gradients


def _cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Cosine of the angle between two gradients of all parameters."""
    dot = first = second = 0.0
    for name, gradient in one.items():
        a, b = gradient.float(), other[name].float()
        dot += float((a * b).sum(dtype=torch.float64))
        first += float(a.square().sum(dtype=torch.float64))
        second += float(b.square().sum(dtype=torch.float64))
    return dot / (first * second) ** 0.5
