"""Continuous batching: when a sequence ends, the next one takes its slot.

A fixed batch runs until its longest caption ends, while most of its rows are already done. Here
each sequence has a slot in one preallocated key-value cache. The slots in use stay contiguous, so
every step computes only running sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from vlv_model.caption_tokens import FinishReason
from vlv_model.errors import ModelError
from vlv_model.seeds import mix_bytes


@dataclass(frozen=True)
class Sampling:
    """Top-p (nucleus) sampling.

    The draw depends only on (seed, key of the sequence, index of the token), so a key gets the same
    caption in any batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def draw(self, logits: Tensor, keys: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Logits `[n v]`, each row's key and token index -> token ids `[n]`."""
        probabilities = (logits.float() / self.temperature).softmax(-1)
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = ranked.double().cumsum(-1)  # [n v]
        # The token that crosses top_p is kept, and so is the first one in any case.
        kept = ((cumulative - ranked) < self.top_p).sum(-1, keepdim=True)  # [n 1]
        uniform = [self._uniform(*row) for row in zip(keys, indices, strict=True)]
        target = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None]
        target = target * cumulative.gather(1, kept - 1)
        rank = torch.searchsorted(cumulative, target, right=True).minimum(kept - 1)
        return ids.gather(1, rank)[:, 0]

    def _uniform(self, key: int, index: int) -> float:
        """A pseudo-random number in [0, 1), the same on every machine."""
        return (mix_bytes(self.seed, key, index) >> 11) / 2**53


@dataclass(frozen=True)
class FinishedSequence:
    """A finished sequence; `ids` are without the end-of-text."""

    request_id: int
    ids: list[int]
    finish_reason: FinishReason


@dataclass
class RunningSequence:
    """A sequence in a slot, and its token ids so far."""

    request_id: int
    key: int
    ids: list[int] = field(default_factory=list)


class SlotDecoder:
    """Decodes captions from prefixes `[n q h]`, at most `slots` at a time.

    `admit` prefixes while there are `free` slots, and `step` while it is `busy`: a step adds a token
    to every sequence and returns those that ended. All prefixes have the same length. The cache holds
    `2 · layers · slots · kv heads · (q + max_new_tokens - 1) · head dim` values.
    """

    def __init__(
        self,
        language_model: Qwen2ForCausalLM,
        end_of_text: int,
        *,
        slots: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> None:
        config = language_model.config
        if set(config.layer_types) != {"full_attention"}:
            raise ModelError("the language model has sliding windows: captions need full attention")
        self.model = language_model.model
        self.lm_head = language_model.lm_head
        self.end_of_text = end_of_text
        self.slots = slots
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.kv_heads = config.num_key_value_heads
        self.heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.epsilon = config.rms_norm_eps
        self._sequences: list[RunningSequence] = []  # index = slot: slots in use have no gaps
        self._finished: list[FinishedSequence] = []
        self._cache = torch.empty(0)  # [layers 2 slots kv_heads positions head_dim]
        self._rotation = torch.empty(0)  # [2 positions head_dim]: cosines, sines

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self.slots - len(self._sequences)

    @property
    def busy(self) -> bool:
        """Whether a sequence is running, or finished and not yet returned."""
        return bool(self._sequences or self._finished)

    def reset(self) -> list[int]:
        """Drop all sequences, after an error; returns their request ids."""
        dropped = [s.request_id for s in self._sequences]
        dropped += [s.request_id for s in self._finished]
        self._sequences, self._finished = [], []
        return dropped

    @torch.no_grad()
    def admit(self, request_ids: Sequence[int], keys: Sequence[int], prefixes: Tensor) -> None:
        """Start prefixes `[n q h]`, n <= `free`, each with a request id and its image's key.

        Raises ValueError for more prefixes than free slots, or of another length or dtype.
        """
        count, length = prefixes.shape[:2]
        if count > self.free:
            raise ValueError(f"{count} prefixes, but {self.free} free slots")
        self._allocate(prefixes)
        first = len(self._sequences)
        slots = slice(first, first + count)
        rotation = self._rotation[:, None, :length]  # [2 1 q d]
        hidden = prefixes
        for number, layer in enumerate(self.model.layers):
            query, key, value = self._project(layer, hidden, rotation)  # [n heads|kv_heads q d]
            self._cache[number, 0, slots, :, :length] = key
            self._cache[number, 1, slots, :, :length] = value
            attended = F.scaled_dot_product_attention(
                query, *map(self._repeated, (key, value)), is_causal=True
            )
            hidden = self._finish_layer(layer, hidden, attended.transpose(1, 2))
        self._sequences += [RunningSequence(*pair) for pair in zip(request_ids, keys, strict=True)]
        self._position = length
        self._append_tokens(hidden[:, -1], slots)

    @torch.no_grad()
    def step(self) -> list[FinishedSequence]:
        """Add a token to every sequence; returns those that ended since the last call."""
        if self._sequences:
            self._append_tokens(self._forward(), slice(0, len(self._sequences)))
        finished, self._finished = self._finished, []
        return finished

    def _forward(self) -> Tensor:
        """Run the model on the last token of every sequence -> hidden states `[n h]`."""
        count = len(self._sequences)
        device = self._cache.device
        last = torch.tensor([s.ids[-1] for s in self._sequences], device=device)
        lengths = [len(s.ids) for s in self._sequences]
        positions = torch.tensor(lengths, device=device) + (self._position - 1)  # [n]
        end = self._position + max(lengths)
        mask = None  # needed only when the lengths differ
        if min(lengths) < max(lengths):
            mask = torch.arange(end, device=device) <= positions[:, None]
            mask = mask[:, None, None]  # [n 1 1 end]
        rows = torch.arange(count, device=device)
        rotation = self._rotation[:, positions, None]  # [2 n 1 d]
        hidden = self.model.embed_tokens(last)[:, None]  # [n 1 h]
        for number, layer in enumerate(self.model.layers):
            query, key, value = self._project(layer, hidden, rotation[:, :, None])
            keys, values = self._cache[number, :, :count].unbind()
            keys[rows, :, positions] = key[:, :, 0]
            values[rows, :, positions] = value[:, :, 0]
            # Grouped-query attention without repeating keys: the query heads of a key head become
            # query positions.
            grouped = query.view(count, self.kv_heads, -1, self.head_dim)
            attended = F.scaled_dot_product_attention(
                grouped, keys[:, :, :end], values[:, :, :end], attn_mask=mask
            )
            hidden = self._finish_layer(layer, hidden, attended)
        return hidden[:, 0]

    def _project(
        self, layer: nn.Module, hidden: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states `[n t h]` -> query `[n heads t d]`, key and value `[n kv_heads t d]`."""
        attention = layer.self_attn
        normed = self._norm(layer.input_layernorm, hidden)

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        both = torch.cat([attention.q_proj(normed), attention.k_proj(normed)], dim=-1)
        query, key = _rotated(heads(both), rotation).split((self.heads, self.kv_heads), dim=1)
        return query, key, heads(attention.v_proj(normed))

    def _finish_layer(self, layer: nn.Module, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + layer.self_attn.o_proj(attended.reshape(*hidden.shape[:2], -1))
        mlp, normed = layer.mlp, self._norm(layer.post_attention_layernorm, hidden)
        return hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))

    def _norm(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, self.epsilon)

    def _repeated(self, heads: Tensor) -> Tensor:
        return heads.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def _append_tokens(self, hidden: Tensor, slots: slice) -> None:
        """Append the next token to the sequences in `slots`, from their last hidden states `[n h]`."""
        logits = self.lm_head(self._norm(self.model.norm, hidden))  # [n v]
        sequences = self._sequences[slots]
        tokens = self._choose_tokens(logits, sequences)
        ended = []
        for slot, (sequence, token) in enumerate(zip(sequences, tokens, strict=True), slots.start):
            reason: FinishReason | None = None
            if token == self.end_of_text:
                reason = "stop"
            else:
                sequence.ids.append(token)
                if len(sequence.ids) == self.max_new_tokens:
                    reason = "length"
            if reason:
                self._finished.append(FinishedSequence(sequence.request_id, sequence.ids, reason))
                ended.append(slot)
        self._free_slots(ended)

    def _choose_tokens(self, logits: Tensor, sequences: Sequence[RunningSequence]) -> list[int]:
        """The next token of each sequence, from logits `[n v]`."""
        if self.sampling is None:
            chosen = logits.argmax(-1)
        else:
            indices = [len(s.ids) for s in sequences]
            chosen = self.sampling.draw(logits, [s.key for s in sequences], indices)
        return chosen.tolist()

    def _free_slots(self, ended: list[int]) -> None:
        """Free the slots `ended`: sequences of the last slots in use move into the gaps."""
        for slot in reversed(ended):
            last = self._sequences.pop()
            if slot < (moved := len(self._sequences)):
                end = self._position + len(last.ids)
                self._cache[:, :, slot, :, :end] = self._cache[:, :, moved, :, :end]
                self._sequences[slot] = last

    def _allocate(self, prefixes: Tensor) -> None:
        """Allocate the cache once the first prefix gives length, device and dtype."""
        positions = prefixes.shape[1] + self.max_new_tokens - 1
        layers = len(self.model.layers)
        shape = (layers, 2, self.slots, self.kv_heads, positions, self.head_dim)
        if self._cache.shape == shape and self._cache.dtype == prefixes.dtype:
            return
        if self._sequences:
            raise ValueError("all prefixes must have the same length and dtype")
        self._cache = prefixes.new_zeros(shape)
        all_positions = torch.arange(positions, device=prefixes.device)[None]
        cosines, sines = self.model.rotary_emb(prefixes, all_positions)  # [1 positions d] each
        # rotate_half negates the first half; the sign goes into the sines, once.
        sines[..., : self.head_dim // 2] *= -1
        self._rotation = torch.cat([cosines, sines])


def _rotated(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding of heads `[n heads t d]` (Su et al. 2021, in halves)."""
    cosines, sines = rotation
    return heads * cosines + heads.roll(heads.shape[-1] // 2, -1) * sines


def decode(decoder: SlotDecoder, keys: Sequence[int], prefixes: Tensor) -> list[FinishedSequence]:
    """Decode all prefixes `[n q h]` with an idle decoder; results are in the same order."""
    results: dict[int, FinishedSequence] = {}
    admitted = 0
    while admitted < len(keys) or decoder.busy:
        if count := min(decoder.free, len(keys) - admitted):
            rows = range(admitted, admitted + count)
            admitted += count
            decoder.admit(rows, keys[rows.start : admitted], prefixes[rows.start : admitted])
        results |= {finished.request_id: finished for finished in decoder.step()}
    return [results[i] for i in range(len(keys))]
