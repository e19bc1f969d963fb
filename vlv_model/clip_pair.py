"""The two frozen CLIP text encoders of SDXL and SD 3.5: CLIP-L and OpenCLIP bigG.

Each reads its own caption embeddings in place of token embeddings. The condition is their
penultimate layers side by side, without final norm. The pooled vector is the final norm of the last
layer at one position, projected. Of a prompt that is the position of the first end token: the last
one, when the prompt fills all positions. The mask is causal, so it has seen all others. Caption
embeddings fill their positions as such a prompt does: theirs is the last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from vlv_model.conditions import Condition
from vlv_model.config import SpecialTokens
from vlv_model.freezing import freeze
from vlv_model.text_encoder import (
    causal_mask,
    check_positions,
    hidden_states,
    prompt_ids,
    with_special_tokens,
    without_special,
)

Clip = Any
"""CLIPTextModel or CLIPTextModelWithProjection."""


class ClipPair(nn.Module):
    """Caption embeddings `[b q 768+1280]`, or prompts -> a condition; the methods of TextEncoder.

    `bottleneck=False` (an ablation) returns caption embeddings unchanged, with zeros as pooled
    vector.
    """

    pooled_parts: tuple[str, ...]  # the encoders whose pooled vectors count

    def __init__(
        self,
        text_encoder: Clip,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        *,
        bottleneck: bool = True,
        special_tokens: SpecialTokens = "none",
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.tokenizers = tokenizers
        self.bottleneck = bottleneck
        self.special_tokens = special_tokens
        freeze(self)

    @property
    def pretrained_parts(self) -> dict[str, Clip]:
        """The pretrained models by part."""
        return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    @property
    def widths(self) -> tuple[int, ...]:
        """What the caption projectors must give, one width per text encoder."""
        return tuple(clip.config.hidden_size for clip in self.pretrained_parts.values())

    @property
    def width(self) -> int:
        """Width of the embeddings of both encoders, side by side."""
        return sum(self.widths)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        pooled = [self.pretrained_parts[part] for part in self.pooled_parts]
        return sum(clip.config.projection_dim for clip in pooled)

    @property
    def max_length(self) -> int:
        """Number of positions, 77 in CLIP."""
        clips = self.pretrained_parts.values()
        return min(clip.config.max_position_embeddings for clip in clips)

    def check_queries(self, num_queries: int) -> None:
        """Raise ModelError when there are more queries than text positions."""
        check_positions(num_queries, self.max_length, self.special_tokens)

    def forward(self, caption_embeddings: Tensor) -> Tensor:
        """Caption embeddings -> the condition's embeddings of the queries, which stage 2 reads."""
        return without_special(self.condition(caption_embeddings).embeddings, self)

    def condition(self, caption_embeddings: Tensor) -> Condition:
        """Caption embeddings `[b q 768+1280]` -> embeddings `[b q 2048]` and the pooled vector."""
        if not self.bottleneck:
            return Condition(
                caption_embeddings,
                caption_embeddings.new_zeros(len(caption_embeddings), self.pooled_width),
            )
        inputs = list(caption_embeddings.split(self.widths, dim=-1))
        if self.special_tokens == "bos_eos":
            clips = self.pretrained_parts.values()
            inputs = [
                with_special_tokens(_text_model(clip), one)
                for clip, one in zip(clips, inputs, strict=True)
            ]
        last = torch.full((len(caption_embeddings),), inputs[0].shape[1] - 1)
        return self._encode(inputs, [last, last])

    @torch.no_grad()
    def prompt_condition(self, prompts: list[str]) -> Condition:
        """The condition of prompts, truncated or padded to all positions."""
        inputs, ends = [], []
        for clip, tokenizer in zip(self.pretrained_parts.values(), self.tokenizers, strict=True):
            ids = prompt_ids(tokenizer, prompts, self.max_length)
            table = clip.get_input_embeddings()
            inputs.append(table(ids.to(table.weight.device)))
            ends.append(_first_end(clip, ids))
        return self._encode(inputs, ends)

    def unconditional(self) -> Condition:
        """The unconditional input of guidance, for one row."""
        raise NotImplementedError

    def _encode(self, inputs: list[Tensor], ends: list[Tensor]) -> Condition:
        embeddings, pooled = [], []
        parts = self.pretrained_parts.items()
        for (part, clip), tokens, end in zip(parts, inputs, ends, strict=True):
            text_model = _text_model(clip)
            penultimate = hidden_states(text_model, tokens, skip=1)
            embeddings.append(penultimate)
            if part in self.pooled_parts:
                mask = causal_mask(text_model, penultimate)
                last = text_model.encoder.layers[-1](penultimate, mask, is_causal=True)
                rows = torch.arange(len(last), device=last.device)
                at_end = last[rows, end.to(last.device)]
                pooled.append(clip.text_projection(text_model.final_layer_norm(at_end)))
        return Condition(torch.cat(embeddings, dim=-1), torch.cat(pooled, dim=-1))


class SDXLTextEncoders(ClipPair):
    """SDXL's: the pooled vector is bigG's, and the unconditional input is zeros."""

    pooled_parts = ("text_encoder_2",)

    def unconditional(self) -> Condition:
        """Zeros in place of both, as `force_zeros_for_empty_prompt` says of the published model."""
        weight = self.text_encoder_2.text_projection.weight
        return Condition(
            weight.new_zeros(1, self.max_length, self.width), weight.new_zeros(1, self.pooled_width)
        )


class SD3TextEncoders(ClipPair):
    """SD 3.5's: both pooled vectors, and the encoded empty prompt as unconditional input."""

    pooled_parts = ("text_encoder", "text_encoder_2")

    def unconditional(self) -> Condition:
        """The empty prompt, in both encoders."""
        return self.prompt_condition([""])


def _text_model(clip: Clip) -> CLIPTextModel:
    return clip.text_model if isinstance(clip, CLIPTextModelWithProjection) else clip


def _first_end(clip: Clip, ids: Tensor) -> Tensor:
    """Position of the first end token of each row, as transformers finds it: `[b]`."""
    end = clip.config.eos_token_id
    return ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)
