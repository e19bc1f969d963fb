"""Images of scenes and the training loop for pretraining all parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.tiny_world import scenes
from pipelines.tiny_world.dataset import drawing_seed
from pipelines.training.config import TrainConfig
from pipelines.training.engine import learning_rate as rate_of
from vlv_model.preprocessing import vae_pixels

WARMUP_STEPS = 100


@dataclass(frozen=True)
class Pictures:
    """Drawn scenes of one split."""

    split: scenes.Split
    seed: int
    count: int

    @cached_property
    def scenes(self) -> list[scenes.Scene]:
        """The scene of each image."""
        return scenes.sample(self.seed, self.count, self.split)

    @cached_property
    def squares(self) -> Tensor:
        """The images, uint8 `[n 3 64 64]`."""
        pictures = [
            np.asarray(scenes.draw(scene, drawing_seed(self.seed, self.split, i)))
            for i, scene in enumerate(self.scenes)
        ]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    def vae_pixels(self, rows: Tensor) -> Tensor:
        """The VAE's input for some rows, `[b 3 64 64]` in [-1, 1]."""
        return vae_pixels(self.squares[rows])


@dataclass(frozen=True)
class Fitted:
    """The result of training a part."""

    steps: int
    seconds: float
    loss: float  # mean of the last twentieth of the steps


def fit(
    name: str,
    models: Iterable[nn.Module],
    loss_of: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> Fitted:
    """Train `models` on the loss of `loss_of`, which samples a batch with the generator.

    AdamW, linear warm-up, cosine decay and gradient clipping with the defaults of `TrainConfig`.
    """
    train = TrainConfig(
        steps=steps, learning_rate=learning_rate, warmup_steps=min(WARMUP_STEPS, steps - 1)
    )
    # A dict: modules may share weights.
    unique = {id(p): p for model in models for p in model.parameters() if p.requires_grad}
    parameters = list(unique.values())
    for model in models:
        model.eval()  # tiny models underfit: dropout and drop-path would only add noise
    optimizer = torch.optim.AdamW(
        parameters, learning_rate, betas=train.betas, weight_decay=train.weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    losses, started = [], time.perf_counter()
    with tqdm(total=steps, desc=name, unit="step", mininterval=5) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_of(train, step)
            loss = loss_of(generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", refresh=False)
            bar.update()
    last = losses[-max(1, steps // 20) :]
    return Fitted(steps, round(time.perf_counter() - started, 1), float(np.mean(last)))
