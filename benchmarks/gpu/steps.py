"""Training steps: ours against the reference's, with equal weights and batches."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.device import published_peak
from benchmarks.gpu.predicted import training_gb
from benchmarks.gpu.setting import Setting
from benchmarks.training.steps import StageName
from benchmarks.training.throughput import (
    PARITY,
    loss_difference,
    measure_stage,
    needed_flops,
)
from pipelines.estimate.flops import matrix_rate

_STEPS = 3  # timed, after two of warm-up


def stage1(setting: Setting) -> dict[str, Any]:
    """Steps of stage 1."""
    return _steps(setting, "stage1")


def stage2(setting: Setting) -> dict[str, Any]:
    """Steps of stage 2."""
    return _steps(setting, "stage2")


def _steps(setting: Setting, stage: StageName) -> dict[str, Any]:
    """Time, memory and MFU of each variant; `mfu` is of the published peak, else of measured products."""
    import torch

    size, device = setting.size, setting.device
    difference = loss_difference(size, stage, device)
    flops = needed_flops(size, stage, device)
    variants = measure_stage(size, stage, device, turns=1, steps=_STEPS if setting.on_cuda else 1)
    measured = matrix_rate(device)
    peak = published_peak(torch.cuda.get_device_name(device)) if setting.on_cuda else None
    for name, figures in variants.items():
        rate = 1e3 * flops / figures["ms_per_step"]
        figures["tflops"] = round(rate / 1e12, 5)
        figures["mfu"] = round(rate / peak, 4) if peak else None
        figures["share_of_matrix_rate"] = round(rate / measured, 4)
        if name != "reference":
            figures["predicted_gb"] = training_gb(setting, stage, name)
    return {
        "images": size.batch[stage == "stage2"],
        "loss_difference": difference,
        "parity": difference <= PARITY,
        "variants": variants,
    }
