"""Embed's `--dry-run`: memory, disk, hours and dollars before anything is loaded."""

from __future__ import annotations

import sys
from typing import Any

import torch

from pipelines.embed.config import EmbedConfig
from pipelines.estimate.counting import Count, count_inference, without_data
from pipelines.estimate.image_job import ImageJobEstimate, actor_memory
from pipelines.estimate.machines import Gpu
from pipelines.estimate.memory import Memory, on_gpu
from pipelines.estimate.report import arithmetic_of
from vlv_model.checkpoints.skeleton import num_parameters
from vlv_model.features.extractors import EXTRACTORS, ClipText
from vlv_model.precision import dtype_of

_ROW_BYTES = 40  # of key, name, status and scores, compressed


def _count(config: EmbedConfig, rows: int) -> Count:
    extractor: Any = EXTRACTORS[config.embed.extractor].skeleton(config.embed)
    with without_data("cuda" if on_gpu(config.actors.use_gpu) else "cpu", extractor) as device:
        if isinstance(extractor, ClipText):  # the longest captions
            ids = torch.zeros(rows, extractor.window, dtype=torch.long, device=device)
            return count_inference(extractor, lambda: extractor.embed(ids, torch.ones_like(ids)))
        side = extractor.square.size
        squares = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=device)
        return count_inference(extractor, lambda: extractor.describe(squares))


def dry_run(config: EmbedConfig) -> str:
    """The estimate as text."""
    embed = config.embed
    print("counting activations …", file=sys.stderr, flush=True)
    extractor = EXTRACTORS[embed.extractor].skeleton(embed)
    weights = dtype_of(embed.precision).itemsize * num_parameters(extractor)

    def memory(batch: int) -> Memory:
        return actor_memory(config.actors, weights, _count(config, batch).peak)

    def per_second(gpu: Gpu) -> float:
        useful = gpu.rates[arithmetic_of(embed.precision)] * config.estimate.mfu
        return useful / _count(config, 1).flops

    vector = 0 if embed.scores_only else 4 * extractor.width
    return ImageJobEstimate(
        parameters=num_parameters(extractor),
        precision=embed.precision,
        setting="embed.batch_size",
        batch=embed.batch_size,
        memory=memory,
        bytes_each=vector + _ROW_BYTES,
        stored=f"features, {vector:,} bytes a row" if vector else "scores",
        per_second=per_second,
    ).report(config.data, config.actors, config.estimate)
