"""Captions images as they are finished; an image that fails does not affect the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.recaption.config import GenerateConfig
from vlv_model.caption_tokens import GeneratedCaption
from vlv_model.captioner import VLVCaptioner
from vlv_model.decoding import Sampling
from vlv_model.freezing import evaluating

# Prefixes computed at once on a CPU: more are hardly faster and take more memory.
_CPU_PREFIXES = 32


class ModelDiedError(RuntimeError):
    """The model fails for every image: its process has to be replaced."""


@dataclass(frozen=True)
class Outcome:
    """The caption of the image at `position`, or an error."""

    position: int
    caption: GeneratedCaption | None = None
    error: str | None = None


class Engine:
    """Runs the captioner in this process; computes prefixes in batches ahead of the decoder."""

    def __init__(self, captioner: VLVCaptioner, generate: GenerateConfig) -> None:
        self.captioner = captioner.eval()
        self.generate = generate
        self.device = next(captioner.parameters()).device

    def captions(self, keys: Sequence[int], images: Tensor) -> Iterator[Outcome]:
        """Caption squares uint8 `[n 3 s s]`; yields outcomes in the order in which they finish.

        If a batch fails, its images are retried one by one. An image that fails alone gets an Outcome
        with an error. Raises ModelDiedError if a blank square fails too.
        """
        done: set[int] = set()
        try:
            for outcome in self._caption_all(keys, images):
                done.add(outcome.position)
                yield outcome
            return
        except Exception:  # reported below for the image that causes it
            remaining = [position for position in range(len(keys)) if position not in done]
        for position in remaining:
            yield self._caption_one(position, keys[position], images[position : position + 1])

    def _caption_one(self, position: int, key: int, image: Tensor) -> Outcome:
        try:
            (outcome,) = self._caption_all([key], image)
            return Outcome(position, outcome.caption)
        except Exception as error:
            self._check_alive(image, error)
            return Outcome(position, error=f"{type(error).__name__}: {error}"[:200])

    def _check_alive(self, image: Tensor, cause: Exception) -> None:
        try:
            list(self._caption_all([0], torch.zeros_like(image)))
        except Exception:
            raise ModelDiedError(f"the model fails for every image: {cause}") from cause

    def _caption_all(self, keys: Sequence[int], images: Tensor) -> Iterator[Outcome]:
        with evaluating(self.captioner):
            if self.generate.num_beams > 1:
                yield from self._beam_search(images)
            else:
                yield from self._decode(keys, images)

    def _beam_search(self, images: Tensor) -> Iterator[Outcome]:
        size = self.generate.batch_size
        for first in range(0, len(images), size):
            prefix = self.captioner.prefix(images[first : first + size].to(self.device))
            captions = self.captioner.search(
                prefix,
                self.generate.num_beams,
                self.generate.max_new_tokens,
                self.generate.early_stopping,
            )
            yield from (Outcome(first + i, caption) for i, caption in enumerate(captions))

    def _decode(self, keys: Sequence[int], images: Tensor) -> Iterator[Outcome]:
        size = self.generate.batch_size
        slots = min(size, len(keys))
        if self.device.type == "cpu":
            size = min(size, _CPU_PREFIXES)
        sampling = Sampling(**settings) if (settings := self.generate.sampling) else None
        decoder = self.captioner.decoder(slots, self.generate.max_new_tokens, sampling)
        prefixes: Tensor | None = None
        encoded = start = 0  # images with a prefix; images admitted to the decoder
        while start < len(keys) or decoder.busy:
            while decoder.free and start < len(keys):
                if prefixes is None or start == encoded:
                    prefixes = self.captioner.prefix(
                        images[encoded : encoded + size].to(self.device)
                    )
                    first, encoded = encoded, encoded + len(prefixes)
                rows = range(start, min(start + decoder.free, encoded))
                within = slice(rows.start - first, rows.stop - first)
                decoder.admit(rows, keys[rows.start : rows.stop], prefixes[within])
                start = rows.stop
            for finished in decoder.step():
                yield Outcome(finished.request_id, self.captioner.caption_of(finished))
