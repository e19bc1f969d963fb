"""Images in, captions as they are finished out; what goes wrong with one image stays with it."""

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

# Images whose prefixes are computed at once on a CPU: more are hardly faster and take more memory.
_CPU_PREFIXES = 32


class ModelDiedError(RuntimeError):
    """The model captions nothing any more, whatever the image: its process has to be replaced."""


@dataclass(frozen=True)
class Outcome:
    """What became of the image at `position`: a caption, or why there is none."""

    position: int
    caption: GeneratedCaption | None = None
    error: str | None = None


class Engine:
    """The captioner in this process. Prefixes are computed in batches ahead of the decoder."""

    def __init__(self, captioner: VLVCaptioner, generate: GenerateConfig) -> None:
        self.captioner = captioner.eval()
        self.generate = generate
        self.device = next(captioner.parameters()).device

    def captions(self, keys: Sequence[int], images: Tensor) -> Iterator[Outcome]:
        """Captions of squares uint8 `[n 3 s s]`, in the order in which they are finished.

        Where a batch fails, its images are tried one by one; one that fails alone, while a blank
        square passes, is an Outcome with an error. Raises ModelDiedError where the blank one fails
        too.
        """
        done: set[int] = set()
        try:
            for outcome in self._together(keys, images):
                done.add(outcome.position)
                yield outcome
            return
        except Exception:  # whatever it is, it is told of the image that has it when alone
            left = [position for position in range(len(keys)) if position not in done]
        for position in left:
            yield self._alone(position, keys[position], images[position : position + 1])

    def _alone(self, position: int, key: int, image: Tensor) -> Outcome:
        try:
            (outcome,) = self._together([key], image)
            return Outcome(position, outcome.caption)
        except Exception as error:
            self._check_alive(image, error)
            return Outcome(position, error=f"{type(error).__name__}: {error}"[:200])

    def _check_alive(self, image: Tensor, cause: Exception) -> None:
        try:
            list(self._together([0], torch.zeros_like(image)))
        except Exception:
            raise ModelDiedError(f"the model captions no image any more: {cause}") from cause

    def _together(self, keys: Sequence[int], images: Tensor) -> Iterator[Outcome]:
        with evaluating(self.captioner):
            if self.generate.num_beams > 1:
                yield from self._searched(images)
            else:
                yield from self._decoded(keys, images)

    def _searched(self, images: Tensor) -> Iterator[Outcome]:
        size = self.generate.batch_size
        for first in range(0, len(images), size):
            prefix = self.captioner.prefix(images[first : first + size].to(self.device))
            found = self.captioner.search(
                prefix,
                self.generate.num_beams,
                self.generate.max_new_tokens,
                self.generate.early_stopping,
            )
            yield from (Outcome(first + i, caption) for i, caption in enumerate(found))

    def _decoded(self, keys: Sequence[int], images: Tensor) -> Iterator[Outcome]:
        size = self.generate.batch_size
        slots = min(size, len(keys))
        if self.device.type == "cpu":
            size = min(size, _CPU_PREFIXES)
        sampling = Sampling(**draws) if (draws := self.generate.draws) else None
        decoder = self.captioner.decoder(slots, self.generate.max_new_tokens, sampling)
        prefixes: Tensor | None = None
        begun = start = 0  # images that have a prefix, and that are in the decoder or through it
        while start < len(keys) or decoder.busy:
            while decoder.free and start < len(keys):
                if prefixes is None or start == begun:
                    prefixes = self.captioner.prefix(images[begun : begun + size].to(self.device))
                    first, begun = begun, begun + len(prefixes)
                rows = range(start, min(start + decoder.free, begun))
                within = slice(rows.start - first, rows.stop - first)
                decoder.admit(rows, keys[rows.start : rows.stop], prefixes[within])
                start = rows.stop
            for finished in decoder.step():
                yield Outcome(finished.request_id, self.captioner.caption_of(finished))
