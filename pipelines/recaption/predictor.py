"""Ray Data transform that captions the squares of a chunk."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipelines.execution import telemetry
from pipelines.execution.read_images import squares
from pipelines.images.rows import CAPTION, CAPTION_ROW, JOINED_ROW, OK, status, with_image_feature
from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.engine import Engine, ModelDiedError, Outcome, local_engine
from pipelines.recaption.health import Health, health_of
from vlv_model.caption_tokens import GeneratedCaption
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.loading import num_positions
from vlv_model.config import ModelConfig
from vlv_model.errors import ConfigError

_HEALTH = [field.name for field in fields(Health)]


def check_length(model: ModelConfig, generate: GenerateConfig) -> None:
    """Check that the language model has a position for each embedding and token; loads no weights.

    Raises ConfigError, and ModelError when its configuration cannot be read.
    """
    positions, prefix = num_positions(model), model.num_queries
    if prefix + generate.max_new_tokens > positions:
        raise ConfigError(
            f"generate.max_new_tokens={generate.max_new_tokens}: the language model has {positions} "
            f"positions, and the image takes {prefix}: set generate.max_new_tokens to at most "
            f"{positions - prefix}"
        )


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


def _update_metrics(captions: list[GeneratedCaption], start: float) -> None:
    """Add a chunk's captions, begun at time `start`, to Ray's metrics."""
    telemetry.RECAPTION_IMAGES.add(len(captions))
    ended = sum(caption.finish_reason == "stop" for caption in captions)
    telemetry.RECAPTION_TOKENS.add(ended + sum(caption.num_tokens for caption in captions))
    if captions:
        telemetry.RECAPTION_BATCH_SECONDS.observe(time.perf_counter() - start)


class CaptionImages:
    """Captions the squares of a chunk; the model is loaded once, when the actor starts."""

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

    def __call__(self, block: pa.Table) -> pa.Table:
        statuses, errors = block["status"].to_pylist(), block["error"].to_pylist()
        usable = np.flatnonzero([value == OK for value in statuses])  # int64 even when empty
        captions: list[GeneratedCaption | None] = [None] * len(statuses)
        health: list[Health | None] = [None] * len(statuses)
        start = time.perf_counter()
        for outcome in self._caption(block.take(usable)):
            row = usable[outcome.id]
            if (caption := outcome.caption) is not None:
                captions[row] = caption = replace(caption, text=self.postprocess(caption.text))
                health[row] = health_of(caption.text, caption.finish_reason == "length")
            if outcome.error:
                statuses[row], errors[row] = self.failed, outcome.error
        _update_metrics([caption for caption in captions if caption is not None], start)
        schema, images = CAPTION_ROW, {}
        if "image" in block.column_names:
            schema = with_image_feature(JOINED_ROW)
            pairs = zip(block["name"].to_pylist(), block["image"].to_pylist(), strict=True)
            # Also for rows without a caption.
            images["image"] = [image and {"bytes": image, "path": name} for name, image in pairs]
        return pa.table(
            {
                "chunk": block["chunk"],
                "key": block["key"],
                "name": block["name"],
                **images,
                "caption": pa.array([c and c.text for c in captions], pa.string()),
                "num_tokens": pa.array([c and c.num_tokens for c in captions], pa.int32()),
                "finish_reason": pa.array([c and c.finish_reason for c in captions], pa.string()),
                **{name: [h and getattr(h, name) for h in health] for name in _HEALTH},
                "model": pa.array([self.fingerprint] * len(statuses), pa.string()),
                "status": pa.array(statuses, pa.string()),
                "error": pa.array(errors, pa.string()),
            },
            schema=schema.insert(0, pa.field("chunk", pa.int64())),
        )

    def _caption(self, rows: pa.Table) -> Iterator[Outcome]:
        if not rows.num_rows:
            return
        images = torch.from_numpy(squares(rows["pixels"], self.image_size))  # uint8 [n 3 s s]
        try:
            yield from self.engine.captions(rows["key"].to_pylist(), images)
        except ModelDiedError as error:
            # An error would end the job; Ray replaces a process that exits, and reloads the model.
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
