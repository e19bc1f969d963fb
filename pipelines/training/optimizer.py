"""The optimiser of both stages."""

from __future__ import annotations

import torch

from pipelines.training.config import TrainConfig
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
