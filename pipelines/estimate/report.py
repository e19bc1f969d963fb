"""The lines that every dry run prints: memory by part, hours and dollars."""

from __future__ import annotations

import math
from collections.abc import Callable

from pipelines.estimate.config import EstimateConfig
from pipelines.estimate.machines import Arithmetic, Machine, gpus
from pipelines.estimate.memory import FRAGMENTATION, Memory, largest_batch
from pipelines.estimate.words import count_words, memory_words, size_words, time_words
from vlv_model.config import Precision

Lines = list[tuple[str, str]]
_PARTS = ("weights", "gradients", "optimizer", "buckets", "activations", "update", "context")


def parameter_lines(trained: int, frozen: int) -> Lines:
    return [("parameters", f"{count_words(trained)} trained, {count_words(frozen)} frozen")]


def memory_lines(memory: Memory, what: str, on_gpu: bool) -> Lines:
    """Each part that is not empty, and the total."""
    lines = [("memory", f"of each {'GPU' if on_gpu else 'process'}: {what}")]
    for part in _PARTS:
        if size := getattr(memory, part):
            lines.append((f"  {part}", f"{size / 1e9:8.2f} GB"))
    note = f"  (activations x {FRAGMENTATION:g} for fragments" if on_gpu else "  ("
    note += "; buckets come when some of them are gone)" if memory.buckets else ")"
    total = memory.total if on_gpu else memory.allocated
    return [*lines, ("  total", f"{total / 1e9:8.2f} GB{note}".removesuffix("  ()"))]


def card_lines(
    memory: Memory,
    estimate: EstimateConfig,
    setting: str,
    rows: int,
    count: Callable[[int], Memory],
    valid: Callable[[int], int] = lambda largest: largest,
) -> Lines:
    """Whether the memory fits the named card, and the largest batch that does; else, which cards it fits.

    `setting` names the batch size, `rows` is its value, `valid` lowers a size to one that may be set.
    """
    machine = estimate.found_machine()
    if machine is None:
        fitting = [gpu.name for gpu in gpus() if memory.total <= gpu.memory]
        return [
            ("fits", ", ".join(fitting) or "none of the GPUs in pipelines/estimate/machines.yaml")
        ]
    gpu, total = machine.gpu, memory.total
    verdict = "fits" if total <= gpu.memory else "does NOT fit"
    lines = [(verdict, f"{gpu.name}: {total / 1e9:.1f} of {gpu.memory / 1e9:.1f} GB")]
    if memory.least > gpu.memory:
        return [
            *lines,
            ("largest", f"no {setting} fits: {memory_words(memory.least)} without activations"),
        ]
    largest = largest_batch(rows, memory, count, gpu.memory)
    settable = valid(largest) if largest else 0
    if not settable:
        return [*lines, ("largest", f"not even {setting}=1 fits")]
    more = f" ({largest} would fit)" if largest > settable else ""
    return [*lines, ("largest", f"{setting}={settable}{more}")]


def arithmetic_of(precision: Precision, tf32: bool = False) -> Arithmetic:
    if precision == "bfloat16":
        return "bfloat16"
    return "tf32" if tf32 else "float32"


def hours_lines(
    images: float | None,
    per_second: float,
    workers: int,
    machine: Machine,
    estimate: EstimateConfig,
) -> Lines:
    """Hours and dollars of `images` images at `per_second` a GPU."""
    machines = math.ceil(workers / machine.gpus)
    named = f"{machines} x {machine.name}{' (spot)' if estimate.spot else ''}"
    lines = [("speed", f"{per_second * workers:,.1f} images/s on {workers} GPUs ({named})")]
    if images is None:
        return lines
    seconds = images / (per_second * workers)
    lines.append(("time", f"{time_words(seconds)} for {count_words(images)} images"))
    price = estimate.usd_per_hour(machine)
    if price is None:
        return [*lines, ("dollars", f"give estimate.price: USD per hour of one {machine.name}")]
    usd = seconds / 3600 * price * machines
    each = usd / images * 1e6
    lines.append(
        ("dollars", f"{usd:,.0f} USD at {price:.2f} an hour; {each:,.2f} per million images")
    )
    return lines


def assumption_lines(estimate: EstimateConfig, decodes: bool = False) -> Lines:
    text = f"MFU {estimate.mfu:g}"
    if decodes:
        text += f", {estimate.bandwidth_share:g} of the bandwidth"
    text += ", without start-up, communication and data; assumptions until measured"
    return [("assumed", text)]


def disk_line(size: float, what: str) -> tuple[str, str]:
    return ("disk", f"{size_words(size)}: {what}")
