"""Pretrains the language model on text about training scenes, without images.

A text names either the colour or the shape of each object. A language model trained on whole captions
learns that the held-out pairs never occur, and then prefers the likelier word over the image's embeddings
(docs/experiments.md).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from benchmarks.pretraining.fitting import Fitted, Pictures, fit
from pipelines.tiny_world.scenes import PHRASES, Object, Scene
from vlv_model.caption_tokens import tokenize_captions

BATCH_SIZE = 64


def train_language_model(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pictures: Pictures,
    steps: int,
    seed: int,
) -> Fitted:
    """Train in place on `partial_text`, with an end-of-text token after each text."""
    rng = np.random.default_rng(seed)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(pictures.count, (BATCH_SIZE,), generator=generator).tolist()
        texts = [partial_text(pictures.scenes[row], rng) for row in rows]
        return model(**tokenize_captions(tokenizer, texts)).loss

    return fit("language model", [model], loss_of, steps=steps, learning_rate=2e-3, seed=seed)


def partial_text(scene: Scene, rng: np.random.Generator) -> str:
    """The caption without the colour or the shape of each object.

    a large red object left of a small square on a gray background
    """
    first, second = (_partly(thing, rng) for thing in (scene.first, scene.second))
    relation = PHRASES[scene.relation]
    return f"a {first} {relation} a {second} on a {scene.background} background"


def _partly(thing: Object, rng: np.random.Generator) -> str:
    name = f"{thing.colour} object" if rng.random() < 0.5 else thing.shape
    return f"{thing.size} {name}"
