"""Captions as token ids, and back: `[caption][end-of-text][padding]`.

No begin-of-text and no chat template. Labels and masks come from lengths, never from
`ids == pad`: Qwen2.5 pads with the end-of-text token, so a mask taken from the ids would hide the
label that teaches the model to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlv_model.errors import ModelError

IGNORED = -100  # cross_entropy's ignore_index

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GeneratedCaption:
    """One generated caption.

    num_tokens excludes the end-of-text. finish_reason is `stop` when the model produced the
    end-of-text and `length` when the caption was cut at `max_new_tokens`.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that ends a caption, in training and generation: the tokenizer's eos token.

    For the Qwen2.5 base models this is `<|endoftext|>`. Raises ModelError without an eos token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer '{tokenizer.name_or_path}' has no eos token, which ends a caption: "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def tokenize_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_tokens: int = 300
) -> dict[str, Tensor]:
    """Captions -> `input_ids attention_mask labels`, int64 `[b n]`, n <= `max_tokens`.

    `max_tokens` includes the end-of-text; a caption that is cut gets none, since it does not end
    there. Labels are `IGNORED` on the padding. Text that spells a special token stays text.
    """
    end_of_text = end_of_text_id(tokenizer)
    rows = []
    for ids in _encode(tokenizer, captions):
        fits = len(ids) < max_tokens
        rows.append([*ids, end_of_text] if fits else ids[:max_tokens])
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    length = max((len(row) for row in rows), default=0)
    input_ids = torch.full((len(rows), length), end_of_text, dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    is_caption = torch.arange(length) < lengths[:, None]  # [b n]
    return {
        "input_ids": input_ids,
        "attention_mask": is_caption.long(),
        "labels": input_ids.masked_fill(~is_caption, IGNORED),
    }


def count_tokens(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[int]:
    """Number of tokens of each caption, without the end-of-text."""
    return [len(ids) for ids in _encode(tokenizer, captions)]


def decode_captions(tokenizer: PreTrainedTokenizerBase, new_ids: Tensor) -> list[GeneratedCaption]:
    """Generated ids `[b n]` -> captions; ids after the end-of-text are ignored."""
    end_of_text = end_of_text_id(tokenizer)
    captions = []
    for ids in new_ids.tolist():
        stopped = end_of_text in ids
        if stopped:
            ids = ids[: ids.index(end_of_text)]
        text = caption_text(tokenizer, ids)
        captions.append(GeneratedCaption(text, len(ids), "stop" if stopped else "length"))
    return captions


def caption_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Generated ids, without the end-of-text, as text."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[list[int]]:
    if not captions:
        return []
    return tokenizer(list(captions), add_special_tokens=False, split_special_tokens=True).input_ids
