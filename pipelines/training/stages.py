"""What the two stages do not share: the model, the batch, and what its loss is an average of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.florence2.modeling_florence2 import Florence2VisionBlock

from pipelines.images.latents import LatentReader
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.data import Batch, mix
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.config import ModelConfig
from vlv_model.errors import ConfigError
from vlv_model.lora import is_adapter

# What models consist of: UNet and VAE of the first two, Florence-2's vision tower of the third, the
# other models of transformers of the fourth.
BLOCKS = (
    BasicTransformerBlock,
    ResnetBlock2D,
    Florence2VisionBlock,
    GradientCheckpointingLayer,
)
FORMS = 64  # of one kind of block: a UNet has blocks of many widths, torch gives up after 8


@dataclass(frozen=True)
class Prepared:
    """A micro-batch as the model takes it."""

    keys: list[int]
    inputs: dict[str, Tensor]
    weight: int  # what the loss is a mean over: images in stage 1, label tokens in stage 2

    def idle(self) -> Prepared:
        """The same for the model, of which nothing counts."""
        return replace(self, keys=[], weight=0)


@dataclass(frozen=True)
class Stage:
    """A model whose `forward(**inputs)` is its loss, and how a batch becomes those inputs."""

    name: Literal["stage1", "stage2"]
    model: nn.Module
    columns: list[str]  # of the table, beside the image
    prepare: Callable[[Batch], Prepared]
    fresh: tuple[str, ...]  # how the names of parameters begin that start random

    def parameter_groups(self, pretrained_rate: float) -> list[dict[str, Any]]:
        """The trainable parameters for an optimiser; `share` is of the scheduled learning rate."""
        fresh: list[nn.Parameter] = []
        pretrained: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                is_fresh = name.startswith(self.fresh) or is_adapter(name)
                (fresh if is_fresh else pretrained).append(parameter)
        groups = [
            {"params": fresh, "share": 1.0},
            {"params": pretrained, "share": pretrained_rate},
        ]
        return [group for group in groups if group["params"]]

    def checkpoint_activations(self) -> None:
        """Keep few activations of a forward pass, and compute the others again in the backward one.

        In the UNet and in whatever of transformers is in train mode, which frozen parts are not: what
        these pass a gradient on with is small. Losses and gradients stay what they are: dropout is drawn again as it was.
        """
        for part in self.model.modules():
            if isinstance(part, UNet2DConditionModel):
                part.enable_gradient_checkpointing()
            elif isinstance(part, PreTrainedModel) and part.supports_gradient_checkpointing:
                part.activation_checkpointing_enable({"use_reentrant": False})

    def compile(self, device: torch.device, blocks: tuple[type[nn.Module], ...] = BLOCKS) -> None:
        """Have the compiler of torch (TorchInductor) build the models' `blocks` when they first run.

        Blocks and not whole models: equal ones are built once, and a caption of another length
        builds no whole model anew. Names of parameters stay; losses differ by rounding. Raises
        ConfigError where the machine lacks the compiler that is called for `device`.
        """
        variable, kinds = ("CC", "gcc clang") if device.type == "cuda" else ("CXX", "g++")
        candidates = [os.environ[variable]] if os.environ.get(variable) else kinds.split()
        if not any(map(shutil.which, candidates)):
            raise ConfigError(
                f"train.compile=true needs a C compiler, and this machine has no "
                f"{' or '.join(candidates)}: install one, or set train.compile=false"
            )
        torch._dynamo.config.recompile_limit = FORMS
        torch._inductor.config.fallback_random = True  # dropout as without compilation
        for part in self.model.modules():
            if isinstance(part, blocks):
                part.compile()


def stage1(config: Stage1Config, model: ModelConfig, checkpoint: Path | None) -> Stage:
    """Stage 1 of a run: its model, opened, and the latents that were stored for it, if any.

    The files of `checkpoint` were verified (`verify_checkpoint`).
    """
    stored = LatentReader(config.data.latents) if config.data.latents else None
    autoencoder = VLVAutoEncoder.from_pretrained(
        model,
        checkpoint,
        with_vae=stored is None,
        precision=config.train.precision,
        verify=False,
    )
    return denoising(autoencoder, config.train.seed, stored)


def stage2(config: Stage2Config, model: ModelConfig, checkpoint: Path | None) -> Stage:
    """Stage 2 of a run: its model, opened, trainable where the settings say so.

    The files of `checkpoint` were verified (`verify_checkpoint`).
    """
    captioner = VLVCaptioner.from_pretrained(
        model,
        checkpoint,
        for_training=True,
        lora=config.train.lora,
        precision=config.train.precision,
        verify=False,
    )
    captioner.set_trainable(config.train.trainable)
    return captioning(captioner, config.data.caption_column, config.train.max_caption_tokens)


def denoising(autoencoder: VLVAutoEncoder, seed: int, stored: LatentReader | None = None) -> Stage:
    """The denoising loss of VLVAutoEncoder on images alone (paper §3.2)."""
    shape = autoencoder.latent_shape
    num_timesteps = autoencoder.num_timesteps

    def prepare(batch: Batch) -> Prepared:
        inputs = draws(seed, batch, shape, num_timesteps)
        if stored is not None:
            mean, deviation = stored.read(batch.keys)
            noise = inputs.pop("posterior_noise")
            inputs["latents"] = autoencoder.latent_format.sample(mean, deviation, noise)
        inputs["pixel_values"] = batch.pixel_values
        return Prepared(batch.keys, inputs, weight=len(batch.keys))

    fresh = ("encoder.learnable_queries", "encoder.caption_projector")
    return Stage("stage1", autoencoder, [], prepare, fresh)


def captioning(captioner: VLVCaptioner, column: str, max_tokens: int) -> Stage:
    """The caption loss of VLVCaptioner on image + caption pairs (paper §3.3)."""

    def prepare(batch: Batch) -> Prepared:
        tokens = captioner.tokenize(batch.columns[column], max_tokens)
        inputs = {"pixel_values": batch.pixel_values, **tokens}
        return Prepared(batch.keys, inputs, weight=int((tokens["labels"] >= 0).sum()))

    return Stage("stage2", captioner, [column], prepare, fresh=("language_projector",))


def draws(
    seed: int, batch: Batch, latent_shape: tuple[int, ...], num_timesteps: int
) -> dict[str, Tensor]:
    """Noise and timesteps of stage 1: a pure function of (seed, epoch, key) for each row.

    Returns `noise` and `posterior_noise` `[b c h w]`, standard normal, and `timesteps` `[b]`,
    uniform over the scheduler's. A row draws the same whatever batch or worker it falls into.
    """
    noise, posterior_noise, timesteps = [], [], []
    for epoch, key in zip(batch.epochs, batch.keys, strict=True):
        generator = torch.Generator().manual_seed(mix(seed, epoch, key) >> 1)
        noise.append(torch.randn(latent_shape, generator=generator))
        posterior_noise.append(torch.randn(latent_shape, generator=generator))
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
    return {
        "noise": torch.stack(noise),
        "posterior_noise": torch.stack(posterior_noise),
        "timesteps": torch.stack(timesteps),
    }
