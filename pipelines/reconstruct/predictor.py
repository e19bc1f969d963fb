"""The auto-encoder as a step of a chunk: squares in, the pictures of their embeddings out."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import torch
from PIL import Image

from pipelines.reconstruct.config import DiffusionConfig
from pipelines.schemas import OK, RECONSTRUCTION_ROW, with_image_feature
from pipelines.selection import squares
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.config import ModelConfig


class ReconstructImages:
    """Samples one picture per square; its noise depends on the seed and the key alone."""

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
        size, pictures = self.diffusion.batch_size, []
        for start in range(0, len(keys), size):
            generators = [
                row_generator(self.diffusion.seed, key) for key in keys[start : start + size]
            ]
            batch = self.autoencoder.reconstruct(
                images[start : start + size].to(self.device),
                generators,
                guidance_scale=self.diffusion.guidance_scale,
                num_steps=self.diffusion.num_steps,
                scheduler=self.diffusion.sampler,
            )
            pictures += [png(picture) for picture in batch.cpu()]
        return pictures


def row_generator(seed: int, key: int) -> torch.Generator:
    """Where the noise of one row's picture comes from."""
    return torch.Generator().manual_seed((seed ^ key) & (2**63 - 1))


def png(picture: torch.Tensor) -> bytes:
    """A picture uint8 `[3 h w]` as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
