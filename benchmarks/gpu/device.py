"""The device itself: name, memory, driver, versions, and the speed of matrix products and copies."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from typing import Any

import torch

from benchmarks.gpu.setting import Setting
from pipelines.estimate.flops import matrix_rate, synchronize
from pipelines.estimate.machines import gpus

_VERSIONS = ("torch", "transformers", "diffusers", "deepspeed", "ray", "vllm")


def device(setting: Setting) -> dict[str, Any]:
    """Facts of the device; rates in TFLOP/s (bfloat16 on CUDA, float32 on a CPU) and GB/s."""
    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _VERSIONS},
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "matrix_tflops": round(matrix_rate(setting.device) / 1e12, 3),
        "copy_gb_per_second": round(_copy_rate(setting) / 1e9, 1),
    }
    if setting.on_cuda:
        about = torch.cuda.get_device_properties(setting.device)
        peak = published_peak(about.name)
        figures |= {
            "name": about.name,
            "memory_gb": round(about.total_memory / 1e9, 1),
            "capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
            "published_tflops": peak and peak / 1e12,
        }
    else:
        figures |= {"name": "cpu", "memory_gb": round(_memory() / 1e9, 1)}
    return figures


def published_peak(name: str) -> float | None:
    """Published dense bfloat16 FLOP/s of a card by torch's name for it; None: not known here."""
    known = [gpu for gpu in gpus() if gpu.name.split("-")[0].lower() in name.lower()]
    longest = max(known, key=lambda gpu: len(gpu.name.split("-")[0]), default=None)
    return longest.rates["bfloat16"] if longest else None


def _copy_rate(setting: Setting) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source = torch.zeros(2**30 if setting.on_cuda else 2**26, dtype=torch.uint8)
    source = source.to(setting.device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        synchronize(setting.device)
        begun = time.perf_counter()
        target.copy_(source)
        synchronize(setting.device)
        best = min(best, time.perf_counter() - begun)
    return 2 * source.numel() / best


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    ended = subprocess.run(query, capture_output=True, text=True)
    return ended.stdout.strip().partition("\n")[0] or None


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
