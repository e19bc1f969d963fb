"""The step that captions the squares of chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipelines.execution import telemetry
from pipelines.execution.steps import Chunk
from pipelines.images.rows import CAPTION, CAPTION_ROW, JOINED_ROW, OK, status, with_image_feature
from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.engine import Engine, Request, local_engine
from pipelines.recaption.health import Health, health_of
from vlv_model.caption_tokens import GeneratedCaption
from vlv_model.captioner import VLVCaptioner
from vlv_model.config import ModelConfig

_HEALTH = [field.name for field in fields(Health)]


def open_captioner(
    model: ModelConfig, checkpoint: Path | None, generate: GenerateConfig, device: torch.device
) -> VLVCaptioner:
    """Load the trained captioner on `device`, in `generate.precision`."""
    precision = generate.precision
    return VLVCaptioner.from_pretrained(model, checkpoint, precision=precision).to(device)


def open_engine(
    model: ModelConfig, checkpoint: Path | None, generate: GenerateConfig, device: torch.device
) -> Engine:
    """Load the engine on `device`. Raises ConfigError when vLLM is set but cannot run."""
    if generate.engine == "vllm":
        from pipelines.recaption.vllm_engine import VLLMEngine

        return VLLMEngine(
            open_captioner(model, checkpoint, generate, torch.device("cpu")), generate, device
        )
    return local_engine(open_captioner(model, checkpoint, generate, device), generate)


@dataclass
class _Unfinished:
    """A chunk some of whose images have no caption yet."""

    chunk: Chunk
    statuses: list[str]
    errors: list[str | None]
    left: int  # images without an outcome
    captions: list[GeneratedCaption | None]
    start: float = field(default_factory=time.perf_counter)


class CaptionImages:
    """Captions the squares of chunks; the model is loaded once, when the actor starts.

    The engine gets the images of the next chunk before it runs out of those that it has, so that its
    slots stay full. A chunk is finished as soon as all its images are.
    """

    failed = status(CAPTION, "failed")

    def __init__(
        self,
        model: ModelConfig,
        checkpoint: Path,
        generate: GenerateConfig,
        fingerprint: str,
        use_gpu: bool,
    ) -> None:
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.engine = open_engine(model, checkpoint, generate, self.device)
        self.postprocess = generate.postprocessed
        self.image_size = model.image_size
        self.fingerprint = fingerprint

    def process(self, chunks: Iterator[Chunk | None]) -> Iterator[Chunk]:
        unfinished: dict[int, _Unfinished] = {}
        for chunk in chunks:
            if chunk is None:
                yield from self._advance(unfinished)
                continue
            begun = self._begin(chunk)
            if not begun.left:
                yield self._finish(begun)
                continue
            unfinished[chunk.number] = begun
            while not self.engine.wants_more:
                yield from self._advance(unfinished)
        while self.engine.busy:
            yield from self._advance(unfinished)

    def close(self) -> None:
        self.engine.close()

    def _begin(self, chunk: Chunk) -> _Unfinished:
        """Queue the images of a chunk at the engine."""
        statuses = chunk.rows["status"].to_pylist()
        usable = [row for row, value in enumerate(statuses) if value == OK]
        pixels, keys = chunk.rows["pixels"], chunk.rows["key"]
        self.engine.add(
            Request((chunk.number, row), keys[row].as_py(), self._square(pixels[row]))
            for row in usable
        )
        errors = chunk.rows["error"].to_pylist()
        return _Unfinished(chunk, statuses, errors, len(usable), [None] * len(statuses))

    def _square(self, pixels: pa.Scalar) -> np.ndarray:
        """One value of the column, uint8 `[3 s s]`, without a copy."""
        return np.frombuffer(pixels.as_buffer(), np.uint8).reshape(3, *2 * [self.image_size])

    def _advance(self, unfinished: dict[int, _Unfinished]) -> Iterator[Chunk]:
        """Let the engine work; yields the chunks that this finishes."""
        for outcome in self.engine.step():
            number, row = outcome.id
            its = unfinished[number]
            its.left -= 1
            if (caption := outcome.caption) is not None:
                its.captions[row] = replace(caption, text=self.postprocess(caption.text))
            if outcome.error:
                its.statuses[row], its.errors[row] = self.failed, outcome.error
            if not its.left:
                yield self._finish(unfinished.pop(number))

    def _finish(self, done: _Unfinished) -> Chunk:
        """The rows of a chunk whose images are all done."""
        chunk, rows, captions = done.chunk, done.chunk.rows, done.captions
        _update_metrics([caption for caption in captions if caption is not None], done.start)
        health = [c and health_of(c.text, c.finish_reason == "length") for c in captions]
        schema, images = CAPTION_ROW, {}
        if "image" in rows.column_names:
            schema = with_image_feature(JOINED_ROW)
            pairs = zip(rows["name"].to_pylist(), rows["image"].to_pylist(), strict=True)
            # Also for rows without a caption.
            images["image"] = [image and {"bytes": image, "path": name} for name, image in pairs]
        table = pa.table(
            {
                "key": rows["key"],
                "name": rows["name"],
                **images,
                "caption": pa.array([c and c.text for c in captions], pa.string()),
                "num_tokens": pa.array([c and c.num_tokens for c in captions], pa.int32()),
                "finish_reason": pa.array([c and c.finish_reason for c in captions], pa.string()),
                **{name: [h and getattr(h, name) for h in health] for name in _HEALTH},
                "model": pa.array([self.fingerprint] * len(captions), pa.string()),
                "status": pa.array(done.statuses, pa.string()),
                "error": pa.array(done.errors, pa.string()),
            },
            schema=schema,
        )
        return replace(chunk, rows=table)


def _update_metrics(captions: list[GeneratedCaption], start: float) -> None:
    """Add a chunk's captions, begun at time `start`, to Ray's metrics."""
    telemetry.RECAPTION_IMAGES.add(len(captions))
    ended = sum(caption.finish_reason == "stop" for caption in captions)
    telemetry.RECAPTION_TOKENS.add(ended + sum(caption.num_tokens for caption in captions))
    if captions:
        telemetry.RECAPTION_BATCH_SECONDS.observe(time.perf_counter() - start)
