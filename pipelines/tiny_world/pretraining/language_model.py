"""The language model: text about training scenes, with no picture."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from pipelines.tiny_world.pretraining.fitting import Fitted, Pictures, fit
from pipelines.tiny_world.wording import web_text
from vlv_model.caption_tokens import tokenize_captions

BATCH_SIZE = 64


def train_language_model(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pictures: Pictures,
    steps: int,
    seed: int,
) -> Fitted:
    """Train in place on `web_text`, each text ended by the end-of-text token."""
    rng = np.random.default_rng(seed)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(pictures.count, (BATCH_SIZE,), generator=generator).tolist()
        texts = [web_text(pictures.scenes[row], rng) for row in rows]
        return model(**tokenize_captions(tokenizer, texts)).loss

    return fit("language model", [model], loss_of, steps=steps, learning_rate=2e-3, seed=seed)
