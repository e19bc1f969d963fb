"""What a training makes of its device: memory, and the share of its arithmetic that is used."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from pipelines.training.flops import Flops, count_flops, matrix_rate
from pipelines.training.stages import Prepared, Stage


def memory_gb(device: torch.device) -> float:
    """The most that this process has held: of the CUDA device's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux: in KiB


@dataclass(frozen=True)
class Utilisation:
    """Model FLOP utilisation of the updates of a stage (see `pipelines.training.flops`)."""

    flops: Flops
    rate: float  # FLOP/s of one device on large matrices
    counts_tokens: bool

    @classmethod
    def measure(cls, stage: Stage, batch: Prepared, device: torch.device) -> Utilisation:
        """Count and measure on one rank, with the plain model on its device and a micro-batch."""
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        found = cls(count_flops(stage.model, inputs), matrix_rate(device), stage.name == "stage2")
        if device.type == "cuda":  # `memory_gb` is to tell of the training
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return found

    def of(self, images: int, weight: float, seconds: float, devices: int) -> float:
        """The share, 0 to 1, of an update: `weight` is the stage's, of the whole global batch."""
        tokens = round(weight) if self.counts_tokens else 0
        return self.flops.of(images, tokens) / (seconds * devices * self.rate)
