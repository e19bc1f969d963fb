"""Precompute's `--dry-run`: memory, disk, hours and dollars before anything is loaded."""

from __future__ import annotations

import math
import sys

import torch

from pipelines.estimate.counting import Count, count_inference, without_data
from pipelines.estimate.image_job import ImageJobEstimate, actor_memory
from pipelines.estimate.machines import Gpu
from pipelines.estimate.memory import Memory, on_gpu
from pipelines.estimate.report import arithmetic_of
from pipelines.precompute.config import PrecomputeConfig
from vlv_model.checkpoints import skeleton
from vlv_model.latents import LatentFormat, posterior
from vlv_model.precision import cast, dtype_of


def precompute_memory(config: PrecomputeConfig, rows: int | None = None) -> Memory:
    """Memory of an actor; `rows` replaces `encode.batch_size`. Encodes a batch without data."""
    vae = skeleton.vae(config.model.find()[0])
    weights = dtype_of(config.encode.precision).itemsize * skeleton.num_parameters(vae)
    count = _count(config, rows or config.encode.batch_size)
    return actor_memory(config.actors, weights, count.peak)


def _count(config: PrecomputeConfig, rows: int) -> Count:
    model = config.model.find()[0]
    vae = cast(skeleton.vae(model), config.encode.precision).eval()
    with without_data("cuda" if on_gpu(config.actors.use_gpu) else "cpu", vae) as device:
        side = model.image_size
        squares = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=device)
        return count_inference(vae, lambda: posterior(vae, squares))


def dry_run(config: PrecomputeConfig) -> str:
    """The estimate as text."""
    encode, model = config.encode, config.model.find()[0]
    print("counting activations …", file=sys.stderr, flush=True)
    vae = skeleton.vae(model)
    each = 2 * 2 * math.prod(LatentFormat.of(vae.config).shape(model.image_size))

    def per_second(gpu: Gpu) -> float:
        useful = gpu.rates[arithmetic_of(encode.precision)] * config.estimate.mfu
        return useful / _count(config, 1).flops

    return ImageJobEstimate(
        parameters=skeleton.num_parameters(vae),
        precision=encode.precision,
        setting="encode.batch_size",
        batch=encode.batch_size,
        memory=lambda batch: precompute_memory(config, batch),
        bytes_each=each,
        stored=f"latents, {each:,} bytes an image",
        per_second=per_second,
    ).report(config.data, config.actors, config.estimate)
