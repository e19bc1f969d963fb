"""Writes the inputs of the full-size runs: base models with random weights, checkpoints, images.

Base models have the published configurations (vlv_model.checkpoints.published), special ids and data
types: Florence-2 and Qwen2.5-0.5B in 16 bits, the diffusion model in float32. They take 8 GB.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.full_size.tokenizers import clip_tokenizer, florence_tokenizer, qwen_tokenizer
from pipelines.images.rows import IMAGE_ROW
from pipelines.tiny_world import scenes
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints import published
from vlv_model.checkpoints.files import CheckpointMetadata, StageName
from vlv_model.checkpoints.loading import quietly, resolve_model
from vlv_model.checkpoints.weights import save_checkpoint
from vlv_model.tiny import SCENE_WORDS, write_tiny_models

CAPTION_WORDS = 299  # a token each; with the end-of-text the longest caption of the recipes
IMAGES = 8
LANGUAGE_MODEL = "0.5B"
_PHOTO = (640, 480)


def write_models(folder: Path, size: str) -> Path:
    """Write base models of the tiny or the full size and their model.json, unless they exist."""
    if (folder / "model.json").exists():
        return folder
    if size == "tiny":
        return write_tiny_models(folder)
    torch.manual_seed(0)
    with quietly():
        _write(folder / "florence", _florence, torch.float16)
        florence_tokenizer().save_pretrained(folder / "florence")
        diffusion = folder / "diffusion"
        _write(diffusion / "text_encoder", _text_encoder, torch.float32)
        clip_tokenizer().save_pretrained(diffusion / "tokenizer")
        for part, kind in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel)):
            config = getattr(published, f"SD_21_BASE_{part.upper()}")
            _write(diffusion / part, lambda kind=kind, config=config: kind(**config), torch.float32)
        (diffusion / "scheduler").mkdir(exist_ok=True)
        _write_json(
            diffusion / "scheduler" / "scheduler_config.json", published.SD_21_BASE_SCHEDULER
        )
        config = published.QWEN_25[LANGUAGE_MODEL]
        qwen = folder / "language_model"
        _write(qwen, lambda: Qwen2ForCausalLM(Qwen2Config(**_copy(config))), torch.bfloat16)
        qwen_tokenizer().save_pretrained(qwen)
    parts = {name: name for name in ("florence", "diffusion", "language_model")}
    _write_json(folder / "model.json", parts)
    return folder


def write_checkpoint(
    folder: Path, stage: StageName, models: Path, parent: Path | None = None
) -> Path:
    """Write a checkpoint of the models' own weights, as a training's last one, unless it exists."""
    if (folder / "checkpoint.json").exists():
        return folder
    config = resolve_model(models)[0]
    model: VLVAutoEncoder | VLVCaptioner
    if stage == "stage1":
        model = VLVAutoEncoder.from_pretrained(config, with_vae=False, precision="bfloat16")
    else:
        model = VLVCaptioner.from_pretrained(
            config, parent, for_training=True, precision="bfloat16"
        )
    metadata = CheckpointMetadata(
        stage=stage,
        step=1,
        rows_seen=1,
        config={},
        model=config,
        parent=str(parent) if parent else None,
    )
    return save_checkpoint(folder, model, metadata)


def write_images(file: Path, count: int = IMAGES) -> Path:
    """Write an image table of drawn scenes, photograph-sized, with captions of maximum length."""
    if file.exists():
        return file
    words = [SCENE_WORDS[i % len(SCENE_WORDS)] for i in range(CAPTION_WORDS)]
    rows = []
    for number, scene in enumerate(scenes.sample(0, count)):
        buffer = io.BytesIO()
        scenes.draw(scene, number).resize(_PHOTO).save(buffer, "JPEG", quality=95)
        image = {"bytes": buffer.getvalue(), "path": None}
        about = {"caption": " ".join(words), "status": "ok"}
        rows.append({"key": number * 7919, "url": f"http://x/{number}", "image": image, **about})
    schema = IMAGE_ROW.append(pa.field("caption", pa.string()))
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), file)
    return file


def _write(folder: Path, build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Build a part and write it, unless it exists; one part is in memory at a time."""
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        return
    part = build()
    if dtype != torch.float32:
        part = part.to(dtype)
    part.save_pretrained(folder)  # type: ignore[operator]


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _florence() -> nn.Module:
    return Florence2ForConditionalGeneration(Florence2Config(**_copy(published.FLORENCE_2_LARGE)))


def _text_encoder() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(**_copy(published.SD_21_BASE_TEXT_ENCODER)))


def _copy(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy: transformers modifies the dictionaries it gets."""
    return {name: _copy(v) if isinstance(v, Mapping) else v for name, v in config.items()}
