"""Stable Diffusion 2.1's frozen CLIP text encoder, for caption embeddings or text.

Caption embeddings replace token embeddings; position embeddings, causal mask and final norm stay.
Its output is all the diffusion decoder gets of an image: the information bottleneck.
`vlv_model.clip_pair` has the two encoders of SDXL and SD 3.5 behind the same methods.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.masking_utils import create_causal_mask

from vlv_model.conditions import Condition
from vlv_model.config import SpecialTokens
from vlv_model.errors import ModelError
from vlv_model.freezing import freeze


class TextEncoder(nn.Module):
    """`[b q d]` caption embeddings, or token ids, or prompts -> CLIP embeddings `[b q d]`.

    With `bottleneck=False` (an ablation) caption embeddings are returned unchanged; prompts are
    still encoded. With `special_tokens="bos_eos"` the real begin and end tokens stand around the
    caption embeddings: the condition has two positions more.
    """

    def __init__(
        self,
        clip: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        *,
        bottleneck: bool = True,
        special_tokens: SpecialTokens = "none",
    ) -> None:
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.bottleneck = bottleneck
        self.special_tokens = special_tokens
        freeze(self)

    @property
    def pretrained_parts(self) -> dict[str, nn.Module]:
        """The pretrained models by part."""
        return {"text_encoder": self.clip}

    @property
    def widths(self) -> tuple[int, ...]:
        """What the caption projectors must give, one width per text encoder."""
        return (self.width,)

    @property
    def width(self) -> int:
        """Width d of both embeddings."""
        return self.clip.config.hidden_size

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector: there is none."""
        return 0

    @property
    def max_length(self) -> int:
        """Number of positions, 77 in CLIP."""
        return self.clip.config.max_position_embeddings

    def check_queries(self, num_queries: int) -> None:
        """Raise ModelError when there are more queries than text positions."""
        check_positions(num_queries, self.max_length, self.special_tokens)

    def forward(self, caption_embeddings: Tensor) -> Tensor:
        """Caption embeddings `[b q d]` in place of token embeddings -> CLIP embeddings `[b q d]`.

        Those of the queries alone, which stage 2 reads.
        """
        return without_special(self.condition(caption_embeddings).embeddings, self)

    def condition(self, caption_embeddings: Tensor) -> Condition:
        """Caption embeddings `[b q d]` -> what the UNet attends to."""
        if not self.bottleneck:
            return Condition(caption_embeddings)
        if self.special_tokens == "bos_eos":
            caption_embeddings = with_special_tokens(self.clip, caption_embeddings)
        return Condition(self._encode(caption_embeddings))

    def _encode(self, token_embeddings: Tensor) -> Tensor:
        return self.clip.final_layer_norm(hidden_states(self.clip, token_embeddings))

    @torch.no_grad()
    def encode_ids(self, input_ids: Tensor) -> Tensor:
        """Token ids `[b n]` -> CLIP embeddings `[b n d]`, without an attention mask."""
        return self._encode(self.clip.embeddings.token_embedding(input_ids))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts, truncated or padded to all positions -> CLIP embeddings `[b 77 d]`.

        No attention mask, as Stable Diffusion was trained. The empty prompt is the unconditional
        input of classifier-free guidance.
        """
        ids = prompt_ids(self.tokenizer, prompts, self.max_length)
        return self.encode_ids(ids.to(self.clip.final_layer_norm.weight.device))

    def prompt_condition(self, prompts: list[str]) -> Condition:
        """The condition of prompts."""
        return Condition(self.encode_prompts(prompts))

    def unconditional(self) -> Condition:
        """The unconditional input of guidance, for one row: the empty prompt."""
        return self.prompt_condition([""])


def hidden_states(clip: CLIPTextModel, token_embeddings: Tensor, *, skip: int = 0) -> Tensor:
    """Token embeddings `[b n d]` -> hidden states before the final norm; `skip` of the last layers.

    CLIPTextModel takes ids only, so this calls its parts in the same order.
    """
    hidden = clip.embeddings(inputs_embeds=token_embeddings.to(clip.final_layer_norm.weight.dtype))
    mask = causal_mask(clip, hidden)
    layers = clip.encoder.layers
    for layer in layers[: len(layers) - skip]:
        hidden = layer(hidden, mask, is_causal=True)
    return hidden


def causal_mask(clip: CLIPTextModel, hidden: Tensor) -> Tensor | None:
    """CLIP's mask for hidden states `[b n d]`, in the form that its attention takes."""
    return create_causal_mask(
        config=clip.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
    )


def with_special_tokens(clip: CLIPTextModel, token_embeddings: Tensor) -> Tensor:
    """`[b n d]` -> `[b n+2 d]`: the embeddings of the vocabulary's begin and end tokens around them.

    They are the last two of CLIP's vocabulary; the ids in its configuration are often wrong.
    """
    table = clip.embeddings.token_embedding.weight
    ends = table[-2:].to(token_embeddings).unsqueeze(1)  # [2 1 d]
    begin, end = (one.expand(len(token_embeddings), 1, -1) for one in ends)
    return torch.cat([begin, token_embeddings, end], dim=1)


def without_special(embeddings: Tensor, encoder: nn.Module) -> Tensor:
    """The embeddings of the queries alone."""
    if encoder.special_tokens == "none" or not encoder.bottleneck:
        return embeddings
    return embeddings[:, 1:-1]


def check_positions(num_queries: int, positions: int, special_tokens: SpecialTokens) -> None:
    """Raise ModelError when there are more queries than text positions."""
    free = positions - 2 * (special_tokens == "bos_eos")
    if num_queries > free:
        taken = ", two of them for special_tokens" if free < positions else ""
        raise ModelError(
            f"num_queries is {num_queries}, the text encoder has {positions} positions{taken}: "
            f"set num_queries to {free} or less"
        )


def prompt_ids(tokenizer: CLIPTokenizer, prompts: list[str], max_length: int) -> Tensor:
    """Token ids of prompts, truncated or padded, int64 `[b max_length]`."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
    )
    return tokens.input_ids
