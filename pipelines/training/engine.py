"""The model under DeepSpeed, and what DeepSpeed leaves to us without ZeRO: norm and clipping."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipelines.training.config import TrainConfig
from pipelines.training.deepspeed_config import deepspeed_config
from pipelines.training.optimizer import build_optimizer
from pipelines.training.optimizer_state import begin, trainable
from pipelines.training.stages import Stage


def start_engine(stage: Stage, train: TrainConfig, world_size: int) -> Any:
    """DeepSpeed's engine around the stage's model, which is on its device already, at step 0."""
    import deepspeed

    optimizer = build_optimizer(stage, train)
    engine, *_ = deepspeed.initialize(
        model=stage.model,
        optimizer=optimizer,
        model_parameters=optimizer.param_groups,
        config=deepspeed_config(train, world_size),
        dist_init_required=False,
    )
    begin(engine)
    return engine


@torch.no_grad()
def clip_gradients(engine: Any, max_norm: float) -> float:
    """Without ZeRO: the norm of the whole gradient, which is then scaled to `max_norm` (0: never).

    Called behind the last backward pass of an update, when DeepSpeed has averaged the gradients.
    The norm is taken in float32 whatever the gradients are. One that is not finite is left as it is.
    """
    gradients = [p.grad for _, p in trainable(engine.module) if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms)).item()
    if max_norm and math.isfinite(norm) and norm + 1e-6 > max_norm:  # DeepSpeed's formula
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))
    return norm
