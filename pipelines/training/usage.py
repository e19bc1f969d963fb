"""Peak memory and model FLOP utilisation (MFU) of a training run."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from pipelines.estimate.flops import Flops, count_flops, matrix_rate
from pipelines.training.stages import MicroBatch, Stage


def device_name(device: torch.device) -> str:
    """The GPU's name, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process, in GB: of the CUDA device, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux: in KiB


@dataclass(frozen=True)
class Utilisation:
    """Model FLOP utilisation of a stage's steps (see `pipelines.estimate.flops`)."""

    flops: Flops
    peak_flops: float  # FLOP/s of one device on large matrices
    counts_tokens: bool

    @classmethod
    def measure(cls, stage: Stage, batch: MicroBatch, device: torch.device) -> Utilisation:
        """Measure on one rank, before DeepSpeed wraps the model, with one micro-batch."""
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        flops = count_flops(stage.model, inputs)
        utilisation = cls(flops, matrix_rate(device), stage.name == "stage2")
        if device.type == "cuda":  # so that `memory_gb` reports only the training
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return utilisation

    def mfu(self, images: int, global_valid_tokens: float, seconds: float, devices: int) -> float:
        """MFU, 0 to 1, of a step that took `seconds` on `devices`."""
        tokens = round(global_valid_tokens) if self.counts_tokens else 0
        return self.flops.of(images, tokens) / (seconds * devices * self.peak_flops)
