"""Recaption's `--dry-run`: memory, captions per second, hours and dollars before anything is loaded."""

from __future__ import annotations

import sys

import torch

from pipelines.estimate.counting import Count, count_inference, without_data
from pipelines.estimate.image_job import ImageJobEstimate, actor_memory
from pipelines.estimate.machines import Gpu
from pipelines.estimate.memory import Memory, on_gpu
from pipelines.estimate.report import Lines, arithmetic_of
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
    generate, use_gpu = config.generate, on_gpu(config.actors.use_gpu)
    rows = rows or generate.batch_size
    together = rows if use_gpu or generate.num_beams > 1 else min(rows, CPU_PREFIXES)
    prefix = count_prefix(config, together).peak
    model = _captioner(config)
    weights = dtype_of(generate.precision).itemsize * skeleton.num_parameters(model)
    beams = generate.num_beams
    positions = model.encoder.num_queries + generate.max_new_tokens
    cache = rows * beams * positions * _position_bytes(config, model.language_model)
    scores = rows * beams * model.language_model.config.vocab_size * 4
    if beams > 1:
        activations = max(prefix, 2 * cache + 2 * scores)
    else:
        activations = cache + max(prefix, 2 * scores)
    return actor_memory(config.actors, weights, activations)


def count_prefix(config: RecaptionConfig, rows: int) -> Count:
    """Memory and FLOPs of the prefixes of `rows` images."""
    model = cast(_captioner(config), config.generate.precision).eval()
    with without_data("cuda" if on_gpu(config.actors.use_gpu) else "cpu", model) as device:
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
    numbers, size = skeleton.num_parameters(model), dtype_of(generate.precision).itemsize
    queries = config.model.find()[0].num_queries
    sequences = generate.batch_size * generate.num_beams
    cached = sequences * (queries + tokens / 2) * _position_bytes(config, model)
    step = max(
        (numbers * size + cached) / (gpu.bandwidth * estimate.bandwidth_share),
        sequences * 2 * numbers / useful,
    )
    prefill = 2 * numbers * queries
    return 1 / ((prefix_flops + prefill) / useful + tokens * step / generate.batch_size)


def dry_run(config: RecaptionConfig) -> str:
    """The estimate as text."""
    generate, tokens = config.generate, config.estimate.caption_tokens
    print("counting activations (up to a minute) …", file=sys.stderr, flush=True)
    notes: Lines = []
    if generate.engine == "vllm":
        notes.append(("vLLM", "takes what is left of the GPU for its cache"))

    def per_second(gpu: Gpu) -> float:
        return captions_per_second(config, gpu, count_prefix(config, 1).flops)

    return ImageJobEstimate(
        parameters=skeleton.num_parameters(_captioner(config)),
        precision=generate.precision,
        setting="generate.batch_size",
        batch=generate.batch_size,
        batch_words=f" x {generate.num_beams} beams",
        memory=lambda batch: recaption_memory(config, batch),
        notes=notes,
        bytes_each=tokens * _BYTES_PER_CAPTION + 60,
        stored="the caption table, without images" if config.join else "captions",
        per_second=per_second,
        tokens_each=tokens,
    ).report(config.data, config.actors, config.estimate)


def _captioner(config: RecaptionConfig) -> VLVCaptioner:
    return skeleton.captioner(config.model.find()[0])


def _position_bytes(config: RecaptionConfig, language_model: torch.nn.Module) -> int:
    """Keys and values of one position of one sequence."""
    shape, size = language_model.config, dtype_of(config.generate.precision).itemsize
    width = shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads
    return int(2 * size * shape.num_hidden_layers * width)
