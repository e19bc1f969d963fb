"""The training steps of benchmarks/training/throughput.py: the jobs' and the reference's.

Ours use pipelines/training (stages, optimiser, acceleration) without Ray and DeepSpeed, so that they
run on any machine with torch. `Masters` replaces DeepSpeed's float32 copies of bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training import models
from benchmarks.training.reference_step import ReferenceStage1, ReferenceStage2, ReferenceStep
from pipelines.training.config import Stage2TrainConfig, TrainConfig
from pipelines.training.data import Batch
from pipelines.training.engine import build_optimizer
from pipelines.training.stages import Stage, captioning, denoising
from vlv_model.config import Precision
from vlv_model.latents import posterior
from vlv_model.precision import cast
from vlv_model.preprocessing import vae_pixels
from vlv_model.tiny import SCENE_WORDS

StageName = Literal["stage1", "stage2"]
SEED = 0


@dataclass(frozen=True)
class Variant:
    """A kind of training step."""

    name: str
    ours: bool = True
    precision: Precision = "float32"
    stored_latents: bool = False


def batch_of(size: models.Size, stage: StageName) -> Batch:
    """Blurred noise as images."""
    generator = torch.Generator().manual_seed(SEED)
    rows = size.batch[stage == "stage2"]
    noise = torch.rand(rows, 3, 24, 24, generator=generator)
    images = F.interpolate(noise, size=(size.image_size,) * 2, mode="bilinear")
    return Batch(
        keys=list(range(rows)),
        epochs=[0] * rows,
        pixel_values=(images * 255).round().to(torch.uint8),
    )


def captions_of(size: models.Size, rows: int) -> list[str]:
    """Captions of random lengths, one token per word."""
    rng = np.random.default_rng(SEED)
    low, high = size.caption_tokens
    lengths = rng.integers(low, high, rows, endpoint=True)
    return [" ".join(rng.choice(SCENE_WORDS, length - 1)) for length in lengths]


class OurStep:
    """One update, from a batch on the CPU to the new weights."""

    def __init__(self, stage: Stage, train: TrainConfig, device: torch.device) -> None:
        self.stage, self.train, self.device = stage, train, device
        stage.model.train()
        cast(stage.model, train.precision)
        self.optimizer = build_optimizer(stage, train)
        self.masters = Masters(self.optimizer) if train.precision == "bfloat16" else None
        self.trained = [p for p in stage.model.parameters() if p.requires_grad]

    def __call__(self, batch: Batch) -> float:
        loss = self.stage.model(**self.inputs(batch))
        loss.backward()
        if self.masters:
            self.masters.take_gradients()
        trained = self.masters.floats if self.masters else self.trained
        torch.nn.utils.clip_grad_norm_(trained, self.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters:
            self.masters.give_weights()
        return float(loss.detach())

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        prepared = self.stage.prepare(batch)
        return {name: value.to(self.device) for name, value in prepared.inputs.items()}


class Masters:
    """float32 master copies of bfloat16 weights for the optimiser, as in DeepSpeed."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.halves: list[nn.Parameter] = []
        self.floats: list[nn.Parameter] = []
        for group in optimizer.param_groups:
            copies = [nn.Parameter(p.detach().float()) for p in group["params"]]
            self.halves += group["params"]
            self.floats += copies
            group["params"] = copies

    def take_gradients(self) -> None:
        for half, master in zip(self.halves, self.floats, strict=True):
            master.grad = None if half.grad is None else half.grad.float()
            half.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        torch._foreach_copy_(self.halves, self.floats)


class KeptLatents:
    """The latents of a batch as jobs/precompute.py stores them."""

    def __init__(self, vae: nn.Module, batch: Batch) -> None:
        device = next(vae.parameters()).device
        mean, deviation = posterior(vae, batch.pixel_values.to(device))
        self.mean, self.deviation = (
            t.bfloat16().float().to("cpu", memory_format=torch.contiguous_format)
            for t in (mean, deviation)
        )

    def read(self, keys: list[int]) -> tuple[Tensor, Tensor]:
        return self.mean[keys], self.deviation[keys]


def our_stage(size: models.Size, stage: StageName, device: torch.device, kept: bool) -> Stage:
    """Our stage with a new model; with `kept`, on stored latents."""
    if stage == "stage2":
        captioner = models.captioner(size, device)
        return captioning(captioner, lambda keys, _: captions_of(size, len(keys)), max_tokens=300)
    autoencoder = models.autoencoder(size, device)
    stored = None
    if kept:
        stored = KeptLatents(autoencoder.diffusion_decoder.vae, batch_of(size, stage))
        autoencoder.diffusion_decoder.vae = None
    return denoising(autoencoder, SEED, stored)  # type: ignore[arg-type]


def settings(stage: StageName, size: models.Size, variant: Variant) -> TrainConfig:
    kind = TrainConfig if stage == "stage1" else Stage2TrainConfig
    rows = size.batch[stage == "stage2"]
    return kind(global_batch_size=rows, precision=variant.precision)


def reference_loss(stage: Stage) -> ReferenceStage1 | ReferenceStage2:
    """The reference's loss with the modules of our stage's model."""
    kind = ReferenceStage1 if stage.name == "stage1" else ReferenceStage2
    return kind(stage.model)  # type: ignore[arg-type]


def reference_inputs(size: models.Size, stage: Stage, batch: Batch) -> tuple[object, ...]:
    """The arguments of the reference's loss: squares in [-1, 1], and captions or random draws."""
    squares = vae_pixels(batch.pixel_values)
    if stage.name == "stage2":
        return squares, captions_of(size, len(batch.keys))
    drawn = stage.prepare(batch).inputs
    return squares, drawn["noise"], drawn["timesteps"], drawn["posterior_noise"]


def step_of(
    size: models.Size, stage_name: StageName, device: torch.device, variant: Variant
) -> Callable[[], float]:
    """A function that takes one step with a new model, always on the same batch."""
    batch = batch_of(size, stage_name)
    train = settings(stage_name, size, variant)
    stage = our_stage(size, stage_name, device, variant.stored_latents)
    if variant.ours:
        ours = OurStep(stage, train, device)
        return lambda: ours(batch)
    inputs = reference_inputs(size, stage, batch)
    loss = reference_loss(stage).train()
    step = ReferenceStep(loss, train.learning_rate)
    return lambda: step(*inputs)
