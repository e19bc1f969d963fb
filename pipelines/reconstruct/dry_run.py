"""Reconstruct's `--dry-run`: memory, disk, hours and dollars before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.estimate.counting import Count, count_inference, without_data
from pipelines.estimate.memory import CONTEXT, Memory
from pipelines.estimate.report import (
    assumption_lines,
    card_lines,
    disk_line,
    hours_lines,
    memory_lines,
    parameter_lines,
)
from pipelines.estimate.rows import selected_rows
from pipelines.estimate.words import lines
from pipelines.execution.connection import bounds
from pipelines.reconstruct.config import ReconstructConfig
from vlv_model.checkpoints import skeleton

_BYTES_PER_PIXEL = 1.3  # of a PNG of a generated picture


def reconstruct_memory(config: ReconstructConfig, rows: int | None = None) -> Memory:
    """Memory of an actor; `rows` replaces `diffusion.batch_size`. Runs each part without data."""
    numbers = sum(p.numel() for p in skeleton.autoencoder(config.model.find()[0]).parameters())
    activations = max(count.peak for count in _counts(config, rows or config.diffusion.batch_size))
    return Memory(
        4 * numbers, activations=activations, context=CONTEXT * (config.actors.use_gpu is not False)
    )


def _counts(config: ReconstructConfig, rows: int) -> list[Count]:
    """Encoder, one pass of the UNet, and the VAE's decoder, in float32."""
    model = skeleton.autoencoder(config.model.find()[0]).eval()
    with without_data("cuda" if (config.actors.use_gpu is not False) else "cpu", model) as device:
        decoder, side = model.diffusion_decoder, config.model.find()[0].image_size
        squares = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=device)
        latents = torch.zeros(rows, *model.latent_shape, device=device)
        timestep = torch.zeros(rows, dtype=torch.long, device=device)
        shape = (rows, model.encoder.num_queries, model.text_encoder.width)
        condition = torch.zeros(shape, device=device)
        vae = decoder.vae
        works: list[Callable[[], Tensor]] = [
            lambda: model.clip_embeddings(squares),
            lambda: decoder.unet(latents, timestep, encoder_hidden_states=condition).sample,
            lambda: vae.decode(latents).sample,
        ]
        return [count_inference(model, work) for work in works]


def dry_run(config: ReconstructConfig) -> str:
    """The estimate as text."""
    diffusion, estimate, use_gpu = (
        config.diffusion,
        config.estimate,
        (config.actors.use_gpu is not False),
    )
    print("counting activations (up to a minute) …", file=sys.stderr, flush=True)
    model = config.model.find()[0]
    memory = reconstruct_memory(config)
    rows, origin = selected_rows(config.data, estimate.rows)
    found = parameter_lines(0, memory.weights // 4)
    found += memory_lines(memory, f"float32, {diffusion.batch_size} images", use_gpu)
    if use_gpu:
        found += card_lines(
            memory, estimate, "diffusion.batch_size", diffusion.batch_size,
            lambda batch: reconstruct_memory(config, batch),
        )  # fmt: skip
    found.append(("rows", f"{rows:,} ({origin})" if rows is not None else origin))
    if rows is not None:
        found.append(disk_line(rows * _BYTES_PER_PIXEL * model.image_size**2, "pictures (PNG)"))
    machine = estimate.found_machine()
    if machine is None:
        found.append(("time", "give --machine for hours and dollars"))
    elif use_gpu:
        asked = config.actors.num_actors
        actors = machine.gpus if asked is None else bounds(asked)[1]
        encoder, unet, vae = (count.flops for count in _counts(config, 1))
        # Two passes a step, with the condition and without it.
        flops = encoder + 2 * diffusion.num_steps * unet + vae
        useful = machine.gpu.rates["float32"] * estimate.mfu
        found += hours_lines(rows, useful / flops, actors, machine, estimate)
        found += assumption_lines(estimate)
    return lines(found)
