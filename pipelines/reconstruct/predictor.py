"""The step that reconstructs the squares of a chunk."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from pipelines.execution.read_images import squares
from pipelines.execution.steps import Chunk, ChunkByChunk
from pipelines.images.rows import OK, RECONSTRUCTION_ROW, status, with_image_feature
from pipelines.reconstruct.config import DiffusionConfig
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.config import ModelConfig


class ReconstructImages(ChunkByChunk):
    """Samples one image per square; its noise depends only on the seed and the key."""

    failed = status("reconstruct", "failed")

    def __init__(
        self, model: ModelConfig, checkpoint: Path, diffusion: DiffusionConfig, use_gpu: bool
    ) -> None:
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.autoencoder = VLVAutoEncoder.from_pretrained(model, checkpoint).to(self.device)
        self.image_size = model.image_size
        self.diffusion = diffusion

    def __call__(self, chunk: Chunk) -> Chunk:
        block = chunk.rows
        usable = pa.array([value == OK for value in block["status"].to_pylist()], pa.bool_())
        pixels, keys = block["pixels"].filter(usable), block["key"].filter(usable).to_pylist()
        pictures = iter(self._reconstruct(pixels, keys) if len(pixels) else [])
        images = [next(pictures) if ok else None for ok in usable.to_pylist()]
        rows = {
            "key": block["key"],
            "image": [image and {"bytes": image, "path": None} for image in images],
            "status": block["status"],
            "error": block["error"],
        }
        return replace(chunk, rows=pa.table(rows, schema=with_image_feature(RECONSTRUCTION_ROW)))

    def _reconstruct(self, pixels: pa.ChunkedArray, keys: list[int]) -> list[bytes]:
        images = torch.from_numpy(squares(pixels, self.image_size))  # uint8 [n 3 s s]

        def sample(rows: slice, **sampling: Any) -> torch.Tensor:
            return self.autoencoder.reconstruct(images[rows].to(self.device), **sampling)

        return [png(picture) for picture in sample_batches(self.diffusion, keys, sample)]


def sample_batches(
    diffusion: DiffusionConfig, keys: Sequence[int], sample: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """Sample an image, uint8 `[3 s s]` on the CPU, for each key, in batches.

    `sample(rows, generators=…, guidance_scale=…, num_steps=…, scheduler=…)` samples a slice of the rows.
    A row's noise depends only on the seed and its key.
    """
    pictures: list[torch.Tensor] = []
    for start in range(0, len(keys), diffusion.batch_size):
        rows = slice(start, start + diffusion.batch_size)
        batch = sample(
            rows,
            generators=[
                torch.Generator().manual_seed((diffusion.seed ^ key) & (2**63 - 1))
                for key in keys[rows]
            ],
            guidance_scale=diffusion.guidance_scale,
            num_steps=diffusion.num_steps,
            scheduler=diffusion.sampler,
        )
        pictures += list(batch.cpu())
    return pictures


def png(picture: torch.Tensor) -> bytes:
    """Encode an image, uint8 `[3 h w]`, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
