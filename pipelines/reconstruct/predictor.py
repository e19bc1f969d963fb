"""The auto-encoder as a step of a chunk: squares in, the pictures of their embeddings out."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from pipelines.execution.read_images import squares
from pipelines.images.rows import OK, RECONSTRUCTION_ROW, status, with_image_feature
from pipelines.reconstruct.config import DiffusionConfig
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.config import ModelConfig


class ReconstructImages:
    """Samples one picture per square; its noise depends on the seed and the key alone."""

    failed = status("reconstruct", "failed")

    def __init__(
        self, model: ModelConfig, checkpoint: Path, diffusion: DiffusionConfig, use_gpu: bool
    ) -> None:
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.autoencoder = VLVAutoEncoder.from_pretrained(model, checkpoint).to(self.device)
        self.image_size = model.image_size
        self.diffusion = diffusion

    def __call__(self, block: pa.Table) -> pa.Table:
        usable = pa.array([value == OK for value in block["status"].to_pylist()])
        pixels, keys = block["pixels"].filter(usable), block["key"].filter(usable).to_pylist()
        pictures = iter(self._reconstruct(pixels, keys) if len(pixels) else [])
        images = [next(pictures) if ok else None for ok in usable.to_pylist()]
        rows = {
            "chunk": block["chunk"],
            "key": block["key"],
            "image": [image and {"bytes": image, "path": None} for image in images],
            "status": block["status"],
            "error": block["error"],
        }
        schema = with_image_feature(RECONSTRUCTION_ROW)
        return pa.table(rows, schema=schema.insert(0, pa.field("chunk", pa.int64())))

    def _reconstruct(self, pixels: pa.ChunkedArray, keys: list[int]) -> list[bytes]:
        images = torch.from_numpy(squares(pixels, self.image_size))  # uint8 [n 3 s s]

        def draw(rows: slice, **sampling: Any) -> torch.Tensor:
            return self.autoencoder.reconstruct(images[rows].to(self.device), **sampling)

        return [png(picture) for picture in sampled(self.diffusion, keys, draw)]


def sampled(
    diffusion: DiffusionConfig, keys: Sequence[int], draw: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """A picture uint8 `[3 s s]` on the CPU for each key, drawn a batch at a time.

    `draw(rows, generators=…, guidance_scale=…, num_steps=…, scheduler=…)` samples the pictures of a
    slice of the rows; a row's noise depends on the seed and its key alone.
    """
    pictures: list[torch.Tensor] = []
    for start in range(0, len(keys), diffusion.batch_size):
        rows = slice(start, start + diffusion.batch_size)
        batch = draw(
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
    """A picture uint8 `[3 h w]` as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
