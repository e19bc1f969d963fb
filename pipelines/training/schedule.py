"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pipelines.training.config import TrainConfig


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
