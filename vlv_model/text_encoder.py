"""The diffusion model's frozen CLIP text encoder, for caption embeddings or text.

Caption embeddings replace token embeddings; position embeddings, causal mask and final norm stay.
Its output is all the diffusion decoder gets of an image: the information bottleneck.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.masking_utils import create_causal_mask

from vlv_model.errors import ModelError
from vlv_model.freezing import freeze


class TextEncoder(nn.Module):
    """`[b q d]` caption embeddings, or token ids, or prompts -> CLIP embeddings `[b q d]`.

    With `bottleneck=False` (an ablation) caption embeddings are returned unchanged; prompts are
    still encoded.
    """

    def __init__(
        self, clip: CLIPTextModel, tokenizer: CLIPTokenizer, *, bottleneck: bool = True
    ) -> None:
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.bottleneck = bottleneck
        freeze(self)

    @property
    def width(self) -> int:
        """Width d of both embeddings."""
        return self.clip.config.hidden_size

    @property
    def max_length(self) -> int:
        """Number of positions, 77 in CLIP."""
        return self.clip.config.max_position_embeddings

    def check_queries(self, num_queries: int) -> None:
        """Raise ModelError when there are more queries than text positions."""
        if num_queries > self.max_length:
            raise ModelError(
                f"num_queries is {num_queries}, the text encoder has {self.max_length} positions: "
                f"set num_queries to {self.max_length} or less"
            )

    def forward(self, caption_embeddings: Tensor) -> Tensor:
        """Caption embeddings `[b q d]` in place of token embeddings -> CLIP embeddings `[b q d]`."""
        return self._encode(caption_embeddings) if self.bottleneck else caption_embeddings

    def _encode(self, token_embeddings: Tensor) -> Tensor:
        # CLIPTextModel takes ids only, so this calls its parts in the same order.
        dtype = self.clip.final_layer_norm.weight.dtype
        hidden = self.clip.embeddings(inputs_embeds=token_embeddings.to(dtype))
        mask = create_causal_mask(
            config=self.clip.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
        )
        hidden = self.clip.encoder(
            inputs_embeds=hidden, attention_mask=mask, is_causal=True
        ).last_hidden_state
        return self.clip.final_layer_norm(hidden)

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
