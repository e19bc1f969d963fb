"""The step that encodes the squares of a chunk into latent distributions."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import torch

from pipelines.execution.read_images import squares
from pipelines.execution.steps import Chunk, ChunkByChunk
from pipelines.images.latents import pack_latents
from pipelines.images.rows import LATENT_ROW, OK, status
from pipelines.precompute.config import EncodeConfig
from vlv_model.checkpoints.loading import load_vae
from vlv_model.config import ModelConfig
from vlv_model.freezing import freeze
from vlv_model.latents import posterior


class EncodeImages(ChunkByChunk):
    """Encodes squares; the VAE is loaded once, when the actor starts."""

    failed = status("encode", "failed")

    def __init__(self, model: ModelConfig, encode: EncodeConfig, use_gpu: bool) -> None:
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.vae = freeze(load_vae(model, encode.precision)).to(self.device)
        self.image_size = model.image_size
        self.batch_size = encode.batch_size

    def __call__(self, chunk: Chunk) -> Chunk:
        block = chunk.rows
        usable = pa.array([value == OK for value in block["status"].to_pylist()], pa.bool_())
        pixels = block["pixels"].filter(usable)
        encoded = iter(self._encode(pixels) if len(pixels) else [])
        rows = [next(encoded) if ok else (None, None) for ok in usable.to_pylist()]
        columns = {
            "key": block["key"],
            "mean": [mean for mean, _ in rows],
            "deviation": [deviation for _, deviation in rows],
            "status": block["status"],
            "error": block["error"],
        }
        return replace(chunk, rows=pa.table(columns, schema=LATENT_ROW))

    def _encode(self, pixels: pa.ChunkedArray) -> list[tuple[bytes, bytes]]:
        images = torch.from_numpy(squares(pixels, self.image_size))  # uint8 [n 3 s s]
        rows: list[tuple[bytes, bytes]] = []
        for batch in images.split(self.batch_size):
            mean, deviation = posterior(self.vae, batch.to(self.device))
            rows += zip(pack_latents(mean), pack_latents(deviation), strict=True)
        return rows
