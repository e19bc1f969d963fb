"""Captions images as they are finished; an image that fails does not affect the others.

engine.add(requests)         at any time; `wants_more` says when
while engine.busy:
    engine.step()            outcomes, if any: after a token, or after a batch of beam search
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.execution.steps import ModelDiedError
from pipelines.recaption.config import GenerateConfig
from vlv_model.caption_tokens import GeneratedCaption
from vlv_model.captioner import VLVCaptioner
from vlv_model.decoding import Sampling
from vlv_model.freezing import evaluating

# Prefixes computed at once on a CPU: more are hardly faster and take more memory.
CPU_PREFIXES = 32


@dataclass(frozen=True)
class Request:
    """An image to caption: the caller's `id`, the key that samples depend on, uint8 `[3 s s]`."""

    id: Any
    key: int
    square: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """The caption of the request `id`, or an error."""

    id: Any
    caption: GeneratedCaption | None = None
    error: str | None = None


class Engine(ABC):
    """Captions requests in the order in which they finish.

    If a step fails, the images that it may have failed for are tried alone. An image that fails alone
    gets an Outcome with an error. A subclass says how many tokens or images a step does (`_advance`).
    """

    def __init__(self, captioner: VLVCaptioner, generate: GenerateConfig) -> None:
        self.captioner = captioner.eval()
        self.generate = generate
        self.device = next(captioner.parameters()).device
        self._encode_at_once = generate.batch_size  # for decoders that take prefixes one by one
        if self.device.type == "cpu":
            self._encode_at_once = min(generate.batch_size, CPU_PREFIXES)
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}  # by a number of our own
        self._suspects: deque[Request] = deque()  # to be tried alone
        self._numbers = count()

    def add(self, requests: Iterable[Request]) -> None:
        """Queue images; their ids differ from those of all images that are not finished."""
        self._waiting.extend(requests)

    @property
    def wants_more(self) -> bool:
        """Whether fewer images wait than the model takes at once: more would keep it full."""
        return len(self._waiting) < self.generate.batch_size

    @property
    def busy(self) -> bool:
        """Whether an image is not finished."""
        return bool(self._waiting or self._running or self._suspects)

    def step(self) -> list[Outcome]:
        """Advance the captions; returns what has finished.

        Raises ModelDiedError if a blank square fails too.
        """
        if self._suspects:
            return [self._try_alone(self._suspects.popleft())]
        try:
            with evaluating(self.captioner):
                return self._advance(self._waiting)
        except Exception:  # reported for the image that fails alone
            self._suspects.extend(self._drop_running())
            return []

    def captions(self, keys: Sequence[int], images: Tensor) -> Iterator[Outcome]:
        """Caption squares uint8 `[n 3 s s]`; the id of an outcome is the image's position."""
        positions = range(len(keys))
        self.add(map(Request, positions, keys, images.numpy()))
        while self.busy:
            yield from self.step()

    def close(self) -> None:  # noqa: B027 - most engines hold nothing that outlives them
        """Release what the engine holds."""

    @abstractmethod
    def _advance(self, waiting: deque[Request]) -> list[Outcome]:
        """Start images of `waiting` (see `_start`), advance those that run, return the finished."""

    def _start(self, waiting: deque[Request], most: int) -> dict[int, Request]:
        """Take at most `most` images out of `waiting`; they run, by number, until `_finish`."""
        batch = {next(self._numbers): waiting.popleft() for _ in range(min(most, len(waiting)))}
        self._running |= batch
        return batch

    def _prefixes(self, batch: dict[int, Request]) -> Tensor:
        """The language model's prefixes of a batch, `[n q h]`."""
        squares = np.stack([request.square for request in batch.values()])
        return self.captioner.prefix(torch.from_numpy(squares).to(self.device))

    def _finish(self, number: int, caption: GeneratedCaption) -> Outcome:
        return Outcome(self._running.pop(number).id, caption)

    def _drop_running(self) -> list[Request]:
        """Stop all running images, after an error; returns them."""
        dropped, self._running = list(self._running.values()), {}
        return dropped

    def _try_alone(self, request: Request) -> Outcome:
        try:
            return self._caption_alone(request)
        except Exception as error:
            self._drop_running()
            self._check_alive(request, error)
            return Outcome(request.id, error=f"{type(error).__name__}: {error}"[:200])

    def _check_alive(self, request: Request, cause: Exception) -> None:
        try:
            self._caption_alone(Request(None, 0, np.zeros_like(request.square)))
        except Exception:
            raise ModelDiedError(f"the model fails for every image: {cause}") from cause

    def _caption_alone(self, request: Request) -> Outcome:
        """Caption one image while no other runs."""
        waiting, outcomes = deque([request]), list[Outcome]()
        with evaluating(self.captioner):
            while not outcomes:
                outcomes = self._advance(waiting)
        return outcomes[0]


class SlotEngine(Engine):
    """Greedy decoding or sampling; when a caption ends, the next image takes its slot."""

    def __init__(self, captioner: VLVCaptioner, generate: GenerateConfig) -> None:
        super().__init__(captioner, generate)
        sampling = Sampling(**settings) if (settings := generate.sampling) else None
        self.decoder = captioner.decoder(generate.batch_size, generate.max_new_tokens, sampling)
        self._encoded: deque[int] = deque()  # images with a prefix and without a slot
        self._ready = torch.empty(0)  # their prefixes [n q h]

    def _advance(self, waiting: deque[Request]) -> list[Outcome]:
        """Fill the free slots, and add a token to each running caption."""
        while self.decoder.free and (self._encoded or waiting):
            if not self._encoded:
                batch = self._start(waiting, self._encode_at_once)
                self._ready = self._prefixes(batch)
                self._encoded.extend(batch)
            admitted = min(self.decoder.free, len(self._encoded))
            numbers = [self._encoded.popleft() for _ in range(admitted)]
            keys = [self._running[number].key for number in numbers]
            prefixes, self._ready = self._ready[:admitted], self._ready[admitted:]
            self.decoder.admit(numbers, keys, prefixes)
        return [
            self._finish(finished.request_id, self.captioner.caption_of(finished))
            for finished in self.decoder.step()
        ]

    def _drop_running(self) -> list[Request]:
        self.decoder.reset()
        self._encoded.clear()
        return super()._drop_running()


class BeamEngine(Engine):
    """Beam search, batch by batch: a batch takes as long as its longest caption."""

    def _advance(self, waiting: deque[Request]) -> list[Outcome]:
        generate = self.generate
        batch = self._start(waiting, generate.batch_size)
        captions = self.captioner.search(
            self._prefixes(batch),
            generate.num_beams,
            generate.max_new_tokens,
            generate.early_stopping,
        )
        return [self._finish(*pair) for pair in zip(batch, captions, strict=True)]


def local_engine(captioner: VLVCaptioner, generate: GenerateConfig) -> Engine:
    """The engine that decodes with the captioner itself, in this process."""
    return (BeamEngine if generate.num_beams > 1 else SlotEngine)(captioner, generate)
