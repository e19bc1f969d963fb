"""Reconstruct's `--dry-run`: memory, disk, hours and dollars before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.estimate.counting import Count, count_inference, without_data
from pipelines.estimate.image_job import ImageJobEstimate, actor_memory
from pipelines.estimate.machines import Gpu
from pipelines.estimate.memory import Memory, on_gpu
from pipelines.reconstruct.config import ReconstructConfig
from vlv_model.checkpoints import skeleton
from vlv_model.conditions import Condition

_BYTES_PER_PIXEL = 1.3  # of a PNG of a generated picture


def reconstruct_memory(config: ReconstructConfig, rows: int | None = None) -> Memory:
    """Memory of an actor; `rows` replaces `diffusion.batch_size`. Runs each part without data."""
    activations = max(count.peak for count in _counts(config, rows or config.diffusion.batch_size))
    return actor_memory(config.actors, 4 * _parameters(config), activations)


def _parameters(config: ReconstructConfig) -> int:
    return skeleton.num_parameters(skeleton.autoencoder(config.model.find()[0]))


def _counts(config: ReconstructConfig, rows: int) -> list[Count]:
    """Encoder, one pass of the denoiser, and the VAE's decoder, in float32."""
    model = skeleton.autoencoder(config.model.find()[0]).eval()
    with without_data("cuda" if on_gpu(config.actors.use_gpu) else "cpu", model) as device:
        decoder, side = model.diffusion_decoder, config.model.find()[0].image_size
        squares = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=device)
        latents = torch.zeros(rows, *model.latent_shape, device=device)
        timestep = torch.zeros(rows, dtype=torch.long, device=device)
        text = model.text_encoder
        condition = Condition(
            torch.zeros(rows, model.encoder.num_queries, text.width, device=device),
            torch.zeros(rows, text.pooled_width, device=device),
        )
        vae = decoder.vae
        works: list[Callable[[], Tensor]] = [
            lambda: model.condition(squares).embeddings,
            lambda: decoder.predict(latents, timestep, condition),
            lambda: vae.decode(latents).sample,
        ]
        return [count_inference(model, work) for work in works]


def dry_run(config: ReconstructConfig) -> str:
    """The estimate as text."""
    diffusion = config.diffusion
    print("counting activations (up to a minute) …", file=sys.stderr, flush=True)

    def per_second(gpu: Gpu) -> float:
        encoder, denoiser, vae = (count.flops for count in _counts(config, 1))
        # Two passes a step, with the condition and without it.
        flops = encoder + 2 * diffusion.num_steps * denoiser + vae
        return gpu.rates["float32"] * config.estimate.mfu / flops

    return ImageJobEstimate(
        parameters=_parameters(config),
        precision="float32",
        setting="diffusion.batch_size",
        batch=diffusion.batch_size,
        memory=lambda batch: reconstruct_memory(config, batch),
        bytes_each=_BYTES_PER_PIXEL * config.model.find()[0].image_size ** 2,
        stored="pictures (PNG)",
        per_second=per_second,
    ).report(config.data, config.actors, config.estimate)
