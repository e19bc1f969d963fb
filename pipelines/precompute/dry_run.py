"""Precompute's `--dry-run`: memory, disk, hours and dollars before anything is loaded."""

from __future__ import annotations

import math
import sys

import torch

from pipelines.estimate.counting import Count, count_inference, without_data
from pipelines.estimate.memory import CONTEXT, Memory
from pipelines.estimate.report import (
    arithmetic_of,
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
from pipelines.precompute.config import PrecomputeConfig
from vlv_model.checkpoints import skeleton
from vlv_model.latents import LatentFormat, posterior
from vlv_model.precision import cast, dtype_of


def precompute_memory(config: PrecomputeConfig, rows: int | None = None) -> Memory:
    """Memory of an actor; `rows` replaces `encode.batch_size`. Encodes a batch without data."""
    vae = skeleton.vae(config.model.find()[0])
    weights = dtype_of(config.encode.precision).itemsize * sum(p.numel() for p in vae.parameters())
    activations = _count(config, rows or config.encode.batch_size).peak
    return Memory(
        weights, activations=activations, context=CONTEXT * (config.actors.use_gpu is not False)
    )


def _count(config: PrecomputeConfig, rows: int) -> Count:
    model = config.model.find()[0]
    vae = cast(skeleton.vae(model), config.encode.precision).eval()
    with without_data("cuda" if (config.actors.use_gpu is not False) else "cpu", vae) as device:
        side = model.image_size
        squares = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=device)
        return count_inference(vae, lambda: posterior(vae, squares))


def dry_run(config: PrecomputeConfig) -> str:
    """The estimate as text."""
    encode, estimate, use_gpu = config.encode, config.estimate, (config.actors.use_gpu is not False)
    print("counting activations …", file=sys.stderr, flush=True)
    model = config.model.find()[0]
    vae = skeleton.vae(model)
    memory = precompute_memory(config)
    rows, origin = selected_rows(config.data, estimate.rows)
    found = parameter_lines(0, sum(p.numel() for p in vae.parameters()))
    found += memory_lines(memory, f"{encode.precision}, {encode.batch_size} images", use_gpu)
    if use_gpu:
        found += card_lines(
            memory, estimate, "encode.batch_size", encode.batch_size,
            lambda batch: precompute_memory(config, batch),
        )  # fmt: skip
    found.append(("rows", f"{rows:,} ({origin})" if rows is not None else origin))
    each = 2 * 2 * math.prod(LatentFormat.of(vae.config).shape(model.image_size))
    if rows is not None:
        found.append(disk_line(rows * each, f"latents, {each:,} bytes an image"))
    machine = estimate.found_machine()
    if machine is None:
        found.append(("time", "give --machine for hours and dollars"))
    elif use_gpu:
        asked = config.actors.num_actors
        actors = machine.gpus if asked is None else bounds(asked)[1]
        useful = machine.gpu.rates[arithmetic_of(encode.precision)] * estimate.mfu
        found += hours_lines(rows, useful / _count(config, 1).flops, actors, machine, estimate)
        found += assumption_lines(estimate)
    return lines(found)
