"""Recaption's `--dry-run`: memory, captions per second, hours and dollars before anything is loaded."""

from __future__ import annotations

import sys

import torch

from pipelines.estimate.counting import Count, count_inference, without_data
from pipelines.estimate.machines import Gpu
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
from pipelines.recaption.config import RecaptionConfig
from pipelines.recaption.engine import CPU_PREFIXES
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints import skeleton
from vlv_model.precision import cast, dtype_of

_BYTES_PER_CAPTION = 4.5  # a token of text in Parquet, compressed


def recaption_memory(config: RecaptionConfig, rows: int | None = None) -> Memory:
    """Memory of an actor; `rows` replaces `generate.batch_size`. Runs the prefix without data.

    Greedy decoding computes the next prefixes beside the cache of running captions. Beam search has
    the old and the reordered cache of its batch at the same time, and scores of all tokens.
    """
    generate, use_gpu = config.generate, (config.actors.use_gpu is not False)
    rows = rows or generate.batch_size
    together = rows if use_gpu or generate.num_beams > 1 else min(rows, CPU_PREFIXES)
    prefix = count_prefix(config, together).peak
    model = _captioner(config)
    weights = dtype_of(generate.precision).itemsize * _numbers(model)
    beams = generate.num_beams
    positions = model.encoder.num_queries + generate.max_new_tokens
    cache = rows * beams * positions * _position_bytes(model, config)
    scores = rows * beams * model.language_model.config.vocab_size * 4
    if beams > 1:
        activations = max(prefix, 2 * cache + 2 * scores)
    else:
        activations = cache + max(prefix, 2 * scores)
    return Memory(weights, activations=activations, context=CONTEXT * use_gpu)


def count_prefix(config: RecaptionConfig, rows: int) -> Count:
    """Memory and FLOPs of the prefixes of `rows` images."""
    model = cast(_captioner(config), config.generate.precision).eval()
    with without_data("cuda" if (config.actors.use_gpu is not False) else "cpu", model) as device:
        side = config.model.find()[0].image_size
        squares = torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=device)
        return count_inference(model, lambda: model.prefix(squares))


def captions_per_second(config: RecaptionConfig, gpu: Gpu, prefix_flops: float) -> float:
    """Captions per second of one GPU: prefixes are compute-bound, decoding mostly memory-bound.

    A decoding step reads all weights once for its batch, and the keys and values of each sequence.
    """
    generate, estimate = config.generate, config.estimate
    model = _captioner(config).language_model
    tokens = min(estimate.caption_tokens, generate.max_new_tokens)
    useful = gpu.rates[arithmetic_of(generate.precision)] * estimate.mfu
    numbers, size = _numbers(model), dtype_of(generate.precision).itemsize
    queries = config.model.find()[0].num_queries
    sequences = generate.batch_size * generate.num_beams
    cached = sequences * (queries + tokens / 2) * _position_bytes_of(model, size)
    step = max(
        (numbers * size + cached) / (gpu.bandwidth * estimate.bandwidth_share),
        sequences * 2 * numbers / useful,
    )
    prefill = 2 * numbers * queries
    return 1 / ((prefix_flops + prefill) / useful + tokens * step / generate.batch_size)


def dry_run(config: RecaptionConfig) -> str:
    """The estimate as text."""
    generate, estimate, use_gpu = (
        config.generate,
        config.estimate,
        (config.actors.use_gpu is not False),
    )
    print("counting activations (up to a minute) …", file=sys.stderr, flush=True)
    memory = recaption_memory(config)
    rows, origin = selected_rows(config.data, estimate.rows)
    what = f"{generate.precision}, {generate.batch_size} images x {generate.num_beams} beams"
    found = parameter_lines(0, _numbers(_captioner(config)))
    found += memory_lines(memory, what, use_gpu)
    if use_gpu:
        found += card_lines(
            memory, estimate, "generate.batch_size", generate.batch_size,
            lambda batch: recaption_memory(config, batch),
        )  # fmt: skip
    if generate.engine == "vllm":
        found.append(("vLLM", "takes what is left of the GPU for its cache"))
    found.append(("rows", f"{rows:,} ({origin})" if rows is not None else origin))
    if rows is not None:
        size = rows * (estimate.caption_tokens * _BYTES_PER_CAPTION + 60)
        found.append(
            disk_line(size, "the caption table, without images" if config.join else "captions")
        )
    machine = estimate.found_machine()
    if machine is None:
        found.append(("time", "give --machine for hours and dollars"))
    elif use_gpu:
        asked = config.actors.num_actors
        actors = machine.gpus if asked is None else bounds(asked)[1]
        rate = captions_per_second(config, machine.gpu, count_prefix(config, 1).flops)
        found.append(("tokens", f"{rate * estimate.caption_tokens:,.0f} tokens/s on one GPU"))
        found += hours_lines(rows, rate, actors, machine, estimate)
        found += assumption_lines(estimate, decodes=True)
    return lines(found)


def _captioner(config: RecaptionConfig) -> VLVCaptioner:
    return skeleton.captioner(config.model.find()[0])


def _numbers(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _position_bytes(model: VLVCaptioner, config: RecaptionConfig) -> int:
    return _position_bytes_of(model.language_model, dtype_of(config.generate.precision).itemsize)


def _position_bytes_of(language_model: torch.nn.Module, size: int) -> int:
    """Keys and values of one position of one sequence."""
    shape = language_model.config
    width = shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads
    return int(2 * size * shape.num_hidden_layers * width)
