"""The captioner as a step of a chunk: squares in, caption rows out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pipelines.recaption.config import GenerateConfig
from pipelines.schemas import CAPTION_ROW, OK
from pipelines.selection import squares
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoint import read_checkpoint
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError


def model_fingerprint(model: ModelConfig, checkpoint: Path | None, generate: GenerateConfig) -> str:
    """16 hex digits of all that decides a caption: weights, base models, sizes, decoding.

    Raises CheckpointError when there is no stage-2 checkpoint: captions need a trained captioner.
    """
    if checkpoint is None or (info := read_checkpoint(checkpoint)).stage != "stage2":
        raise CheckpointError(
            "model.path has to name a stage-2 run or checkpoint: only stage 2 teaches to caption"
        )
    decides: dict[str, Any] = {
        "weights": info.sha256,
        "parent": info.parent.sha256 if info.parent else None,
        "base_models": info.base_models,
        "sizes": [model.num_queries, model.image_size, model.encoder_image_size, model.prompt],
        # The batch size changes no caption beyond rounding, but rounding can turn a close call.
        "generate": generate.model_dump(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def open_captioner(
    model: ModelConfig, checkpoint: Path | None, generate: GenerateConfig, device: torch.device
) -> VLVCaptioner:
    """The trained captioner on `device`, in the arithmetic of the settings."""
    dtype = torch.bfloat16 if generate.precision == "bfloat16" else torch.float32
    return VLVCaptioner.from_pretrained(model, checkpoint).to(device, dtype)


class CaptionImages:
    """Captions the squares of a chunk; the model is loaded once, when the actor starts."""

    def __init__(
        self,
        model: ModelConfig,
        checkpoint: Path,
        generate: GenerateConfig,
        fingerprint: str,
        use_gpu: bool,
    ) -> None:
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.captioner = open_captioner(model, checkpoint, generate, self.device)
        self.image_size = model.image_size
        self.generate = generate
        self.fingerprint = fingerprint

    def __call__(self, block: pa.Table) -> pa.Table:
        usable = [value == OK for value in block["status"].to_pylist()]
        pixels = block["pixels"].filter(pa.array(usable))
        generated = iter(self._caption(pixels) if len(pixels) else [])
        rows = [next(generated) if ok else None for ok in usable]
        return pa.table(
            {
                "chunk": block["chunk"],
                "key": block["key"],
                "caption": pa.array([r and r.text for r in rows], pa.string()),
                "num_tokens": pa.array([r and r.num_tokens for r in rows], pa.int32()),
                "finish_reason": pa.array([r and r.finish_reason for r in rows], pa.string()),
                "model": pa.array([self.fingerprint] * len(rows), pa.string()),
                "status": block["status"],
                "error": block["error"],
            },
            schema=pa.schema([("chunk", pa.int64()), *CAPTION_ROW]),
        )

    def _caption(self, pixels: pa.ChunkedArray) -> list[Any]:
        images = torch.from_numpy(squares(pixels, self.image_size))  # uint8 [n 3 s s]
        captions = []
        for batch in images.split(self.generate.batch_size):
            captions += self.captioner.generate(
                batch.to(self.device), self.generate.num_beams, self.generate.max_new_tokens
            )
        return captions
