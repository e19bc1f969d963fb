"""Captions by our engine and by vLLM, as the recaption job opens them."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.setting import Setting
from benchmarks.training import models
from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.predictor import open_engine
from vlv_model import tiny
from vlv_model.checkpoints.export import export_model
from vlv_model.checkpoints.sources import resolve_model

_CAPTIONS = {"tiny": 16, "small": 32, "full": 128}
_TOKENS = {"tiny": 24, "small": 64, "full": 150}


def compare(setting: Setting) -> dict[str, Any]:
    """Captions per second, greedy and bfloat16, and the share of equal captions."""
    images, tokens = _CAPTIONS[setting.size_name], _TOKENS[setting.size_name]
    side = setting.size.image_size
    generator = torch.Generator().manual_seed(0)
    squares = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    figures: dict[str, Any] = {"captions": images, "tokens_each": tokens}
    texts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _exported(setting, Path(folder))
        for name in ("transformers", "vllm"):
            generate = GenerateConfig(
                engine=name, num_beams=1, max_new_tokens=tokens, precision="bfloat16", batch_size=64
            )
            begun = time.perf_counter()
            engine = open_engine(*resolve_model(model), generate, setting.device)
            list(engine.captions([0], squares[:1]))
            figures[f"{name}_start_seconds"] = round(time.perf_counter() - begun, 1)
            begun = time.perf_counter()
            written = {o.position: o.caption for o in engine.captions(list(range(images)), squares)}
            seconds = time.perf_counter() - begun
            figures[f"{name}_captions_per_second"] = round(images / seconds, 2)
            texts[name] = [getattr(written[i], "text", None) for i in range(images)]
            del engine
            gc.collect()
            torch.cuda.empty_cache()
    pairs = list(zip(*texts.values(), strict=True))
    figures["equal_captions"] = sum(one == other for one, other in pairs) / images
    return figures


def _exported(setting: Setting, folder: Path) -> Path:
    """A captioner with random weights, exported in bfloat16."""
    about = setting.size
    lengths = {n: getattr(about, n) for n in ("num_queries", "image_size", "encoder_image_size")}
    config = resolve_model(tiny.write_tiny_models(folder / "tiny"))[0].model_copy(update=lengths)
    captioner = models.captioner(about, torch.device("cpu"))
    metadata = {"stage": "stage2", "step": 0, "rows_seen": 0, "config": {}}
    return export_model(folder / "model", captioner, config, metadata, precision="bfloat16")
