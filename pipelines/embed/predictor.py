"""The step that embeds the squares or the captions of a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.embed.config import EmbedSettings
from pipelines.embed.duplicates import COLUMN
from pipelines.execution.read_images import squares
from pipelines.execution.steps import Chunk, ChunkByChunk
from pipelines.images.features import FEATURES, as_vectors, feature_row
from pipelines.images.rows import OK, status
from vlv_model.features.extractors import load_extractor


class EmbedRows(ChunkByChunk):
    """Embeds rows; the extractor is loaded once, when the actor starts."""

    failed = status("embed", "failed")

    def __init__(self, embed: EmbedSettings, use_gpu: bool) -> None:
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.extractor = load_extractor(embed).to(self.device)
        self.batch_size = embed.batch_size
        width = None if embed.scores_only else self.extractor.width
        later = [] if embed.duplicates is None else [COLUMN]  # filled when all rows are there
        self.schema = feature_row(width, [*self.extractor.scores, *later])

    def __call__(self, chunk: Chunk) -> Chunk:
        block = chunk.rows
        statuses, errors = block["status"].to_pylist(), block["error"].to_pylist()
        usable = np.array([value == OK for value in statuses], bool)
        described = self._describe(block["pixels"].filter(pa.array(usable)))
        finite = np.ones(int(usable.sum()), bool)
        for values in described.values():
            finite &= np.isfinite(values).reshape(len(finite), -1).all(axis=1)
        # A mean over the table would be NaN because of one row.
        for row in np.flatnonzero(usable)[~finite]:
            statuses[row], errors[row] = self.failed, "its features are not finite"
        places = np.full(len(usable), -1)
        places[usable] = np.where(finite, np.arange(len(finite)), -1)
        columns = {
            "key": block["key"],
            "name": block["name"],
            "status": pa.array(statuses, pa.string()),
            "error": pa.array(errors, pa.string()),
        }
        taken = pa.array(places, pa.int64(), mask=places < 0)
        for field in list(self.schema)[len(columns) :]:
            column = described.get(field.name)
            if column is None or not len(column):
                columns[field.name] = pa.nulls(len(places), field.type)
            else:
                values = as_vectors(column) if field.name == FEATURES else pa.array(column)
                columns[field.name] = values.take(taken)
        return replace(chunk, rows=pa.table(columns, schema=self.schema))

    def _describe(self, pixels: pa.ChunkedArray) -> dict[str, np.ndarray]:
        """float32 `[n d]` or `[n]` by column, of rows that are all usable."""
        parts: dict[str, list[np.ndarray]] = {}
        for batch in self._batches(pixels):
            with torch.inference_mode():
                for name, values in self.extractor.describe(batch).items():
                    parts.setdefault(name, []).append(values.float().cpu().numpy())
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _batches(self, pixels: pa.ChunkedArray) -> Iterator[Any]:
        if self.extractor.takes_text:
            texts: Sequence[str] = [value.decode() for value in pixels.to_pylist()]
            yield from (
                texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)
            )
        elif len(pixels):
            images = torch.from_numpy(squares(pixels, self.extractor.square.size))
            yield from (batch.to(self.device) for batch in images.split(self.batch_size))
