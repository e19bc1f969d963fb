"""Memory of a training's weights, gradients and optimiser, in closed form.

What DeepSpeed 0.19 allocates on each worker, for T trained and F frozen parameters, N workers, s bytes
per weight (2 in bfloat16, 4 in float32) and a bucket of B numbers:

    weights     s (T + F); ZeRO-3: s (T + F) / N, and the weights of 10^9 parameters gathered at once
    optimiser   float32 masters and two moments, 12 T / N; without ZeRO 12 T in bfloat16, 8 T in float32
    gradients   ZeRO-2 and 3: 4 T / N, in float32 twice that while several micro-batches accumulate;
                ZeRO-1: s T + s T / N; without ZeRO: s T
    buckets     s B, on CUDA two of them; a copy of what is reduced, in bfloat16 also in float32; in
                bfloat16 a float32 copy of a gradient larger than a bucket (Qwen's token embeddings)
    update      float32 copies of the gradients

With offload, masters and moments are in the machine's memory, with the gradients and a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.estimate.memory import CONTEXT, Memory, on_gpu
from pipelines.training.config import TrainConfig
from pipelines.training.deepspeed_config import BUCKET

if TYPE_CHECKING:
    from torch import nn

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_GATHERED = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
_UNSHARDED_BUCKET = 500_000_000  # numbers that DeepSpeed reduces at once without ZeRO


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    trained: int
    frozen: int
    largest: int  # of a trained tensor

    @classmethod
    def of(cls, model: nn.Module) -> Parameters:
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        every = sum(p.numel() for p in model.parameters())
        return cls(sum(trained), every - sum(trained), max(trained))


def states(train: TrainConfig, parameters: Parameters, workers: int) -> Memory:
    """Memory of a worker's device without activations."""
    gpu = on_gpu(train.use_gpu)
    trained, size = parameters.trained, _ITEM_BYTES[train.precision]
    every = trained + parameters.frozen
    share = -(-trained // workers)
    weights, optimizer, update = size * every, 12 * share, 0
    accumulates = train.accumulation(workers) > 1
    if train.zero_stage == 0:
        optimizer = (8 if size == 4 else 12) * trained
        gradients, buckets = size * trained, 0
        reduced = (size + 4 * (size < 4)) * min(trained, _UNSHARDED_BUCKET)
        update = max(reduced, 4 * trained * (size < 4))
    else:
        reduced = min(BUCKET, trained)
        buckets = size * BUCKET * (1 + gpu) + (size + 4 * (size < 4)) * reduced
        if parameters.largest > BUCKET and size < 4:
            buckets += 4 * parameters.largest
        if train.zero_stage == 1:
            gradients, update = size * (trained + share), 4 * share
        elif size < 4 or train.zero_stage == 3:
            gradients = 4 * share
        else:
            gradients, update = 4 * share * (1 + accumulates), 4 * share * (not accumulates)
        if train.zero_stage == 3:
            weights = size * (-(-every // workers) + min(every, _GATHERED) * (workers > 1))
    if train.offload_optimizer:
        optimizer, update = 0, 0
        buckets += size * parameters.largest
    return Memory(weights, gradients, optimizer, buckets, update=update, context=CONTEXT * gpu)


def offloaded(train: TrainConfig, parameters: Parameters, workers: int) -> int:
    """Bytes of the machine's memory that one worker's offloaded optimiser takes."""
    size = _ITEM_BYTES[train.precision]
    return (16 + size) * -(-parameters.trained // workers) * train.offload_optimizer
