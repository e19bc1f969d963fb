"""One worker of a training: the process group, and a ZeRO-2 step of DeepSpeed."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.setting import Setting
from pipelines.estimate.flops import synchronize

_ELEMENTS = 2**26  # float32: 268 MB


def all_reduce(setting: Setting) -> dict[str, Any]:
    """A sum over a group of one, by NCCL on CUDA and gloo on a CPU: does the library load and run?"""
    _start_group(setting)
    try:
        values = torch.ones(_ELEMENTS, device=setting.device)
        dist.all_reduce(values)
        figures = {"backend": dist.get_backend(), "correct": bool((values == 1).all())}
        if setting.on_cuda:
            figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        return figures
    finally:
        dist.destroy_process_group()


def deepspeed_step(setting: Setting) -> dict[str, Any]:
    """Two steps of stage 2 by the engine of the jobs, and its memory against the estimate.

    The full size takes Qwen2.5-0.5B: the states of 3B, which other GPUs would share, do not fit 80 GB.
    Losses are compared with those of a plain step in the same precision, without dropout.
    """
    setting = replace(setting, chosen_model="0.5B")
    if not setting.on_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from benchmarks.gpu.predicted import training_memory_of
    from benchmarks.training.steps import OurStep, Variant, batch_of, our_stage, settings
    from benchmarks.training.throughput import peak_gb, reset_peak
    from pipelines.training.engine import start_engine

    size, name = setting.size, "stage2"
    precision = "bfloat16" if setting.on_cuda else "float32"
    variant = Variant("ours", precision=precision)
    batch, rows = batch_of(size, name), size.batch[1]
    train = settings(name, size, variant).model_copy(update={"use_gpu": setting.on_cuda})
    plain_stage = our_stage(size, name, setting.device, kept=False)
    plain = OurStep(plain_stage, train, setting.device)
    plain_stage.model.eval()
    expected = [plain(batch) for _ in range(2)]
    del plain, plain_stage
    if setting.on_cuda:
        torch.cuda.empty_cache()
    else:
        # An optional CPU kernel that takes half a minute to compile on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _start_group(setting)
    try:
        stage = our_stage(size, name, setting.device, kept=False)
        reset_peak(setting.device)
        engine = start_engine(stage, train, world_size=1)
        engine.eval()
        inputs = {k: v.to(setting.device) for k, v in stage.prepare(batch).inputs.items()}
        losses, seconds = [], 0.0
        for _ in range(2):
            begun = time.perf_counter()
            loss = engine(**inputs)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
            synchronize(setting.device)
            seconds = time.perf_counter() - begun
        peak = peak_gb(setting.device)
    finally:
        dist.destroy_process_group()
    predicted = training_memory_of(setting, name, variant.name)
    return {
        "precision": precision,
        "images": rows,
        "ms_per_step": round(1e3 * seconds, 1),
        "losses": losses,
        "plain_losses": expected,
        "peak_gb": round(peak, 3),
        "predicted_gb": predicted and round(predicted.allocated / 1e9, 2),
    }


def _start_group(setting: Setting) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    dist.init_process_group("nccl" if setting.on_cuda else "gloo")
