"""What differs between the two stages: the model, its inputs, and the tokens its loss averages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.florence2.modeling_florence2 import Florence2VisionBlock

from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.data import Batch
from pipelines.training.original_sizes import OriginalSizes
from vlv_model.captioner import VLVCaptioner
from vlv_model.config import ModelConfig
from vlv_model.errors import ConfigError
from vlv_model.lora import is_adapter
from vlv_model.seeds import mix

if TYPE_CHECKING:
    from pipelines.images.latents import LatentReader
    from vlv_model.autoencoder import VLVAutoEncoder

Draw = Callable[[Sequence[int], Sequence[int]], list[str]]
"""The captions of images, by their keys and epochs (caption_index.CaptionIndex.draw)."""

RECOMPILE_LIMIT = 64  # per kind of block: a UNet has blocks of many widths, torch's default is 8


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch as the model's inputs."""

    keys: list[int]
    inputs: dict[str, Tensor]
    valid_tokens: int  # label tokens, over which the loss is a mean; in stage 1 one per image

    def without_rows(self) -> MicroBatch:
        """The same inputs, but with no row and no valid token."""
        return replace(self, keys=[], valid_tokens=0)


@dataclass(frozen=True)
class Stage:
    """A model whose `forward(**inputs)` returns the loss, and how a batch becomes those inputs."""

    name: Literal["stage1", "stage2"]
    model: nn.Module
    prepare: Callable[[Batch], MicroBatch]
    random_init: tuple[str, ...]  # name prefixes of randomly initialised parameters

    def parameter_groups(self, pretrained_rate: float) -> list[dict[str, Any]]:
        """The trainable parameters in groups; `share` multiplies the scheduled learning rate."""
        random_init: list[nn.Parameter] = []
        pretrained: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                is_random = name.startswith(self.random_init) or is_adapter(name)
                (random_init if is_random else pretrained).append(parameter)
        groups = [
            {"params": random_init, "share": 1.0},
            {"params": pretrained, "share": pretrained_rate},
        ]
        return [group for group in groups if group["params"]]

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, in the denoiser and the trained transformers.

        Frozen transformers are in eval mode and keep their activations, which are small. Losses and
        gradients do not change, since dropout is replayed.
        """
        from diffusers import SD3Transformer2DModel, UNet2DConditionModel

        for part in self.model.modules():
            if isinstance(part, UNet2DConditionModel | SD3Transformer2DModel):
                part.enable_gradient_checkpointing()
            elif isinstance(part, PreTrainedModel) and part.supports_gradient_checkpointing:
                part.activation_checkpointing_enable({"use_reentrant": False})

    def compile(
        self, device: torch.device, blocks: tuple[type[nn.Module], ...] | None = None
    ) -> None:
        """Compile the models' `blocks` (default: `block_kinds`) with torch.compile when they first run.

        Blocks rather than whole models: equal blocks are compiled once, and another caption length
        recompiles blocks only. Parameter names stay; losses differ by rounding. Raises ConfigError when
        the machine has no C compiler for `device`.
        """
        variable, kinds = ("CC", "gcc clang") if device.type == "cuda" else ("CXX", "g++")
        candidates = [os.environ[variable]] if os.environ.get(variable) else kinds.split()
        if not any(map(shutil.which, candidates)):
            raise ConfigError(
                f"train.compile=true needs a C compiler, and this machine has no "
                f"{' or '.join(candidates)}: install one, or set train.compile=false"
            )
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        torch._inductor.config.fallback_random = True  # dropout as without compilation
        kinds_compiled = blocks or block_kinds()
        for part in self.model.modules():
            if isinstance(part, kinds_compiled):
                part.compile()


def block_kinds() -> tuple[type[nn.Module], ...]:
    """Blocks of denoiser and VAE (the first three), of Florence-2's vision tower, of other transformers."""
    # Here, since stage 2 alone does not need diffusers.
    from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    diffusion = (BasicTransformerBlock, JointTransformerBlock, ResnetBlock2D)
    return (*diffusion, Florence2VisionBlock, GradientCheckpointingLayer)


def stage1(config: Stage1Config, model: ModelConfig, checkpoint: Path | None) -> Stage:
    """Load the model of stage 1, and its stored latents if `data.latents` is set.

    The caller has verified the files of `checkpoint` (`verify_checkpoint`).
    """
    from pipelines.images.latents import LatentReader
    from vlv_model.autoencoder import VLVAutoEncoder

    stored = LatentReader(config.data.latents) if config.data.latents else None
    autoencoder = VLVAutoEncoder.from_pretrained(
        model,
        checkpoint,
        with_vae=stored is None,
        precision=config.train.precision,
        verify=False,
    )
    sizes = OriginalSizes(config.data.input) if model.time_ids == "original" else None
    return denoising(autoencoder, config.train.seed, stored, sizes)


def stage2(config: Stage2Config, model: ModelConfig, checkpoint: Path | None, draw: Draw) -> Stage:
    """Load the model of stage 2 and make the parts in `train.trainable` trainable.

    The caller has verified the files of `checkpoint` (`verify_checkpoint`).
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
    return captioning(captioner, draw, config.train.max_caption_tokens)


def denoising(
    autoencoder: VLVAutoEncoder,
    seed: int,
    stored: LatentReader | None = None,
    sizes: OriginalSizes | None = None,
) -> Stage:
    """The denoising loss of VLVAutoEncoder on images only (paper §3.2)."""
    shape = autoencoder.latent_shape

    def prepare(batch: Batch) -> MicroBatch:
        inputs = noise_and_timesteps(seed, batch, shape, autoencoder.draw_timestep)
        if sizes is not None:
            inputs["original_sizes"] = sizes.read(batch.keys)
        if stored is not None:
            mean, deviation = stored.read(batch.keys)
            noise = inputs.pop("posterior_noise")
            inputs["latents"] = autoencoder.latent_format.sample(mean, deviation, noise)
        inputs["pixel_values"] = batch.pixel_values
        return MicroBatch(batch.keys, inputs, valid_tokens=len(batch.keys))

    random_init = ("encoder.learnable_queries", "encoder.caption_projector")
    return Stage("stage1", autoencoder, prepare, random_init)


def captioning(captioner: VLVCaptioner, draw: Draw, max_tokens: int) -> Stage:
    """The caption loss of VLVCaptioner on images and their captions (paper §3.3)."""

    def prepare(batch: Batch) -> MicroBatch:
        tokens = captioner.tokenize(draw(batch.keys, batch.epochs), max_tokens)
        inputs = {"pixel_values": batch.pixel_values, **tokens}
        return MicroBatch(batch.keys, inputs, valid_tokens=int((tokens["labels"] >= 0).sum()))

    return Stage("stage2", captioner, prepare, random_init=("language_projector",))


def noise_and_timesteps(
    seed: int,
    batch: Batch,
    latent_shape: tuple[int, ...],
    draw_timestep: Callable[[torch.Generator], Tensor],
) -> dict[str, Tensor]:
    """Noise and timesteps of stage 1: for each row a pure function of (seed, epoch, key).

    Returns `noise` and `posterior_noise` `[b c h w]`, standard normal, and `timesteps` `[b]`, as
    `draw_timestep` draws them. They do not depend on a row's batch or worker.
    """
    noise, posterior_noise, timesteps = [], [], []
    for epoch, key in zip(batch.epochs, batch.keys, strict=True):
        generator = torch.Generator().manual_seed(mix(seed, epoch, key) >> 1)
        noise.append(torch.randn(latent_shape, generator=generator))
        posterior_noise.append(torch.randn(latent_shape, generator=generator))
        timesteps.append(draw_timestep(generator))
    return {
        "noise": torch.stack(noise),
        "posterior_noise": torch.stack(posterior_noise),
        "timesteps": torch.stack(timesteps),
    }
