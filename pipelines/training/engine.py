"""The optimiser, the learning rate of each step, and the DeepSpeed engine that wraps a model.

Without ZeRO, this module also computes and clips the gradient norm.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pipelines.training.config import TrainConfig
from pipelines.training.deepspeed_config import deepspeed_config
from pipelines.training.optimizer_state import initialize_state, trainable
from pipelines.training.stages import Stage


def build_optimizer(stage: Stage, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; a group's `share` multiplies the scheduled rate."""
    return torch.optim.AdamW(
        stage.parameter_groups(train.pretrained_rate),
        lr=train.learning_rate,
        betas=train.betas,
        weight_decay=train.weight_decay,
        fused=True,  # one kernel per update, on CPUs too
    )


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of `step` (0-based): linear warm-up, then cosine, linear or constant.

    The decaying schedules reach zero at `train.steps`, one past the last step.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / (train.warmup_steps + 1)
    progress = (step - train.warmup_steps) / (train.steps - train.warmup_steps)
    match train.schedule:
        case "cosine":
            factor = (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            factor = 1 - progress
        case "constant":
            factor = 1.0
    return train.learning_rate * factor


def start_engine(stage: Stage, train: TrainConfig, world_size: int) -> Any:
    """Return a DeepSpeed engine for the stage's model, which is already on its device."""
    import deepspeed

    optimizer = build_optimizer(stage, train)
    engine, *_ = deepspeed.initialize(
        model=stage.model,
        optimizer=optimizer,
        model_parameters=optimizer.param_groups,
        config=deepspeed_config(train, world_size),
        dist_init_required=False,
    )
    initialize_state(engine)
    return engine


@torch.no_grad()
def clip_gradients(engine: Any, max_norm: float) -> float:
    """Without ZeRO: scale the gradients to a norm of at most `max_norm` (0: no clipping).

    Returns the norm before clipping, computed in float32. Called after the last backward pass of an
    update, when DeepSpeed has averaged the gradients. Gradients with a non-finite norm are not scaled.
    """
    gradients = [p.grad for _, p in trainable(engine.module) if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms)).item()
    if max_norm and math.isfinite(norm) and norm + 1e-6 > max_norm:  # DeepSpeed's formula
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))
    return norm
