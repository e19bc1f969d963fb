"""Compare our training steps with a plain implementation of the reference's.

    python benchmarks/training/throughput.py --size {tiny,small,full} --device {cpu,cuda} [--quick]

Both use the same batch and weights, in turn: a model is built, warmed up, timed and dropped, then the
other, several times. The reference (benchmarks/training/reference_step.py) is float32. Ours is float32 on
a CPU; on CUDA it is bfloat16 with float32 master weights, and float32 as well. Losses are compared in
float32 without dropout. MFU is reported on CUDA only. Needs torch, transformers, diffusers and the imports
of pipelines/training/stages.py, but no Ray, DeepSpeed or network. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, too
from benchmarks.training.models import SIZES, Size
from benchmarks.training.steps import (
    OurStep,
    StageName,
    Variant,
    batch_of,
    our_stage,
    reference_inputs,
    reference_loss,
    settings,
    step_of,
)
from pipelines.estimate.flops import Flops, count_flops, matrix_rate, synchronize

REFERENCE = Variant("reference", ours=False)
TURNS = 3
WARM_UP = 2
PARITY = 1e-4


def variants(stage: StageName, device: torch.device) -> list[Variant]:
    """The reference, our step, and its variants."""
    on_cuda = device.type == "cuda"
    precision = "bfloat16" if on_cuda else "float32"
    ours = [Variant("ours", precision=precision)]
    if stage == "stage1":
        ours.append(Variant("ours, latents stored", precision=precision, stored_latents=True))
    if on_cuda:
        ours.append(Variant("ours, float32"))
    return [REFERENCE, *ours]


def loss_difference(size: Size, stage: StageName, device: torch.device) -> float:
    """|ours - reference| / reference of the loss: float32, same weights, batch, draws; no dropout."""
    built = our_stage(size, stage, device, kept=False)
    built.model.eval()
    batch = batch_of(size, stage)
    with torch.no_grad():
        step = OurStep(built, settings(stage, size, REFERENCE), device)
        built.model.eval()
        ours = built.model(**step.inputs(batch)).double()
        inputs = [
            v.to(device) if isinstance(v, torch.Tensor) else v
            for v in reference_inputs(size, built, batch)
        ]
        reference = reference_loss(built).eval()(*inputs).double()
    return float((ours - reference).abs() / reference.abs())


def needed_flops(size: Size, stage: StageName, device: torch.device) -> float:
    """FLOP of one step, without padding."""
    built = our_stage(size, stage, device, kept=False)
    prepared = built.prepare(batch_of(size, stage))
    inputs = {name: value.to(device) for name, value in prepared.inputs.items()}
    flops: Flops = count_flops(built.model, inputs)
    tokens = prepared.valid_tokens if stage == "stage2" else 0
    return flops.of(len(prepared.keys), tokens)


class Turn:
    """Measures time and memory of steps of one variant, with a new model."""

    def __init__(self, size: Size, stage: StageName, device: torch.device, variant: Variant):
        self.device = device
        self.step = step_of(size, stage, device, variant)

    def measure(self, steps: int) -> tuple[list[float], float]:
        """Milliseconds of each step, and peak memory in GB (on a CPU: resident)."""
        for _ in range(WARM_UP):
            self.step()
        reset_peak(self.device)
        milliseconds = []
        for _ in range(steps):
            synchronize(self.device)
            begun = time.perf_counter()
            self.step()
            synchronize(self.device)
            milliseconds.append(1_000 * (time.perf_counter() - begun))
        return milliseconds, peak_gb(self.device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory


def peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmHWM"].split()[0]) * 1024 / 1e9


def measure_stage(
    size: Size, stage: StageName, device: torch.device, turns: int, steps: int
) -> dict[str, Any]:
    """Figures of each variant, by name; `ratio` is the median of the turns' ratios."""
    results: dict[str, list[tuple[list[float], float]]] = {}
    for _ in range(turns):
        for variant in variants(stage, device):
            turn = Turn(size, stage, device, variant)
            results.setdefault(variant.name, []).append(turn.measure(steps))
            del turn
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    medians = {name: [statistics.median(ms) for ms, _ in runs] for name, runs in results.items()}
    images = size.batch[stage == "stage2"]
    figures = {}
    for name, runs in results.items():
        ms = statistics.median(medians[name])
        pairs = zip(medians[REFERENCE.name], medians[name], strict=True)
        figures[name] = {
            "ms_per_step": round(ms, 1),
            "images_per_second": round(1_000 * images / ms, 2),
            "peak_gb": round(max(peak for _, peak in runs), 3),
            "ratio": round(statistics.median(theirs / ours for theirs, ours in pairs), 3),
        }
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stages", choices=("stage1", "stage2"), nargs="+")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per turn")
    parser.add_argument("--quick", action="store_true", help="one turn of one step")
    given = parser.parse_args(arguments)
    size, device = SIZES[given.size], torch.device(given.device)
    turns, steps = (1, 1) if given.quick else (TURNS, given.steps)
    print(describe(device), flush=True)
    rate = matrix_rate(device) if device.type == "cuda" else None
    if rate:
        print(f"bfloat16 matrix products: {rate / 1e12:.0f} TFLOP/s", flush=True)
    last: dict[str, Any] = {"benchmark": "training", "size": given.size, "device": given.device}
    stages: list[StageName] = given.stages or ["stage1", "stage2"]
    for stage in stages:
        difference = loss_difference(size, stage, device)
        flops = needed_flops(size, stage, device)
        results = measure_stage(size, stage, device, turns, steps)
        for figures in results.values():
            figures["gflop_per_second"] = round(flops / figures["ms_per_step"] / 1e6, 1)
            figures["mfu"] = round(flops / figures["ms_per_step"] * 1e3 / rate, 4) if rate else None
        print(table(stage, results, size.batch[stage == "stage2"], difference, flops), flush=True)
        last |= {
            f"{stage}_ratio": results["ours"]["ratio"],
            f"{stage}_mfu": results["ours"]["mfu"],
            f"{stage}_loss_difference": difference,
            stage: results,
        }
    last["mfu"] = min(last[f"{stage}_mfu"] for stage in stages) if rate else None
    last["parity"] = all(last[f"{stage}_loss_difference"] <= PARITY for stage in stages)
    print(json.dumps(last))
    return 0 if last["parity"] else 1


def describe(device: torch.device) -> str:
    import diffusers
    import transformers

    name = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return (
        f"{name}, {torch.get_num_threads()} threads, {versions}, diffusers {diffusers.__version__}"
    )


def table(
    stage: str, results: dict[str, dict[str, Any]], images: int, difference: float, flops: float
) -> str:
    """Figures of a stage as a Markdown table."""
    lines = [
        f"\n{stage}: {images} images a step, {flops / 1e9:.1f} GFLOP needed, "
        f"loss differs by {difference:.1e} (at most {PARITY:.0e})\n",
        "| | ms/step | images/s | peak GB | ratio | GFLOP/s | MFU |\n|---|---|---|---|---|---|---|",
    ]
    for name, figures in results.items():
        mfu = "–" if figures["mfu"] is None else f"{100 * figures['mfu']:.1f} %"
        lines.append(
            f"| {name} | {figures['ms_per_step']} | {figures['images_per_second']} "
            f"| {figures['peak_gb']} | {figures['ratio']} | {figures['gflop_per_second']} | {mfu} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
