"""Compare the predicted memory of a training step with the peak of torch's allocator.

    python -m benchmarks.training.memory --size tiny small
    python -m benchmarks.training.memory --size small full --device cuda

Both stages, both precisions, with and without activation checkpointing: a real step of the engine
that the jobs use, on random weights, in one process. The prediction is that of `--dry-run`. On a CPU
the allocator's peak comes from torch's profiler, on CUDA from its statistics. Resident memory is
printed beside it: it has libraries, oneDNN's own buffers and what the C library keeps. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.training import models
from benchmarks.training.models import Size
from pipelines.training.config import Stage2TrainConfig, TrainConfig
from pipelines.training.data import Batch
from pipelines.training.dry_run import count_stage, with_activations
from pipelines.training.engine import start_engine
from pipelines.training.memory import Parameters, states
from pipelines.training.stages import Stage, captioning, denoising
from vlv_model.config import Precision
from vlv_model.precision import cast


@dataclass(frozen=True)
class Comparison:
    """Bytes of one configuration."""

    name: str
    predicted: int
    measured: int
    resident: int  # peak of the process so far; 0 on CUDA

    def row(self) -> str:
        share = self.predicted / self.measured - 1
        return (
            f"| {self.name} | {self.predicted / 1e9:.3f} | {self.measured / 1e9:.3f} | {share:+.1%} "
            f"| {self.resident / 1e9:.2f} |"
        )


def compare(
    size_name: str, stage_name: str, train: TrainConfig, device: torch.device
) -> Comparison:
    """Predict and measure the second step of a stage, with one worker."""
    size = models.SIZES[size_name]
    rows = size.batch[stage_name == "stage2"]
    tokens = size.caption_tokens[1]
    name = f"{size_name}, {stage_name}, {train.precision}, micro-batch {rows}"
    name += ", checkpointed" * train.activation_checkpointing
    predicted = _predict(size, stage_name, train, rows, tokens)
    on_cuda = device.type == "cuda"
    gc.collect()
    before = _allocated(device)
    stage = _stage(size, stage_name, device, tokens)
    cast(stage.model, train.precision)
    if train.activation_checkpointing:
        stage.checkpoint_activations()
    engine = start_engine(stage, train, world_size=1)
    inputs = stage.prepare(_batch(size, rows)).inputs
    inputs = {name: value.to(device) for name, value in inputs.items()}

    def step() -> None:
        engine.train()
        engine.backward(engine(**inputs))
        engine.step()

    gc.collect()
    built = _allocated(device) - before
    step()
    most = (_peak_on_cuda if on_cuda else peak_on_cpu)(step)
    return Comparison(name, predicted, built + most, _resident(device))


def _predict(size: Size, stage_name: str, train: TrainConfig, rows: int, tokens: int) -> int:
    stage = _stage(size, stage_name, torch.device("meta"), tokens)
    memory = states(train, Parameters.of(stage.model), workers=1)
    squares = (rows, 3, size.image_size, size.image_size)
    return with_activations(memory, count_stage(stage, train, squares, tokens=tokens)).allocated


def _stage(size: Size, stage_name: str, device: torch.device, tokens: int) -> Stage:
    if stage_name == "stage1":
        return denoising(models.autoencoder(size, device), seed=0)
    words = " ".join(["red"] * (tokens - 1))
    captioner = models.captioner(size, device)
    return captioning(captioner, lambda keys, _: [words] * len(keys), tokens)


def _batch(size: Size, rows: int) -> Batch:
    """Noise as images."""
    squares = torch.randint(0, 256, (rows, 3, size.image_size, size.image_size), dtype=torch.uint8)
    return Batch(list(range(rows)), [0] * rows, squares)


def _allocated(device: torch.device) -> int:
    """Bytes that the allocator has given out: torch's on CUDA, the C library's else."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _MallInfo
    info = library.mallinfo2()
    return int(info.uordblks + info.hblkhd)


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def peak_on_cpu(work: Callable[[], object]) -> int:
    """Most bytes that torch's allocator has given out in `work` at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _peak_on_cuda(work: Callable[[], object]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux: in KiB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", nargs="+", choices=models.SIZES, default=["tiny", "small"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--stage", nargs="+", choices=["stage1", "stage2"], default=["stage1", "stage2"]
    )
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if given.device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 29517}.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    backend = "nccl" if given.device == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    print("| model, stage | predicted GB | allocator's peak GB | error | resident GB |")
    print("|---|---|---|---|---|", flush=True)
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    found = []
    for size, stage, precision, checkpointed in product(
        given.size, given.stage, precisions, (False, True)
    ):
        kind = TrainConfig if stage == "stage1" else Stage2TrainConfig
        train = kind(
            global_batch_size=models.SIZES[size].batch[stage == "stage2"],
            precision=precision,
            activation_checkpointing=checkpointed,
            use_gpu=given.device == "cuda",
        )
        found.append(compare(size, stage, train, torch.device(given.device)))
        print(found[-1].row(), flush=True)
    print(json.dumps([asdict(comparison) for comparison in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
