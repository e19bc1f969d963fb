"""Captions decoded in slots: where a sequence ends, the next one enters, and no batch waits.

A batch that is decoded as one runs as long as its longest caption, with fewer and fewer rows that
still say anything. Here each sequence has a slot of one preallocated cache. The slots in use are
kept side by side, so that every step computes what is still being said and nothing else.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from vlv_model.caption_tokens import FinishReason
from vlv_model.errors import ModelError


@dataclass(frozen=True)
class Sampling:
    """Draws tokens instead of taking the most probable one.

    What is drawn follows from (seed, key of the sequence, number of the token) alone: whatever else
    is decoded at the same time, a sequence of one key gets one caption.
    """

    temperature: float = 1.0
    top_p: float = 1.0  # of the most probable tokens, those that reach this share together
    seed: int = 0

    def draw(self, logits: Tensor, keys: Sequence[int], numbers: Sequence[int]) -> Tensor:
        """Logits `[n v]`, each row's key and the number of its token -> token ids `[n]`."""
        probabilities = (logits.float() / self.temperature).softmax(-1)
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        reached = ranked.double().cumsum(-1)  # [n v]
        # The token that crosses the share still belongs to it, as does the first one always.
        kept = ((reached - ranked) < self.top_p).sum(-1, keepdim=True)  # [n 1]
        points = [self._uniform(*row) for row in zip(keys, numbers, strict=True)]
        target = torch.tensor(points, dtype=torch.float64, device=logits.device)[:, None]
        target = target * reached.gather(1, kept - 1)
        rank = torch.searchsorted(reached, target, right=True).minimum(kept - 1)
        return ids.gather(1, rank)[:, 0]

    def _uniform(self, key: int, number: int) -> float:
        """A number in [0, 1) that looks random and is the same on every machine."""
        name = struct.pack("<qqq", self.seed, key, number)
        digest = hashlib.blake2b(name, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


@dataclass(frozen=True)
class Finished:
    """A sequence that came to its end: its ids, without the end-of-text."""

    ticket: int
    ids: list[int]
    finish_reason: FinishReason


@dataclass
class Running:
    """A sequence that has a slot, and what it says so far."""

    ticket: int
    key: int
    ids: list[int] = field(default_factory=list)


class SlotDecoder:
    """Decodes captions from prefixes `[n q h]`, at most `slots` at a time.

    `admit` prefixes while there are `free` slots, `step` while any is `busy`; a step adds a token to
    every sequence and hands back those that ended. All prefixes are equally long. The cache takes
    `2 · layers · slots · kv heads · (q + max_new_tokens - 1) · head dim` values, once.
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
        self._sequences: list[Running] = []  # that of slot i at i: slots in use have no gaps
        self._finished: list[Finished] = []
        self._cache = torch.empty(0)  # [layers 2 slots kv_heads positions head_dim]
        self._rotation = torch.empty(0)  # [2 positions head_dim]: cosines, sines

    @property
    def free(self) -> int:
        return self.slots - len(self._sequences)

    @property
    def busy(self) -> bool:
        """Whether there is anything to step for, or to hand back."""
        return bool(self._sequences or self._finished)

    def reset(self) -> list[int]:
        """Forget all sequences, after an error; returns their tickets."""
        tickets = [s.ticket for s in self._sequences] + [f.ticket for f in self._finished]
        self._sequences, self._finished = [], []
        return tickets

    @torch.no_grad()
    def admit(self, tickets: Sequence[int], keys: Sequence[int], prefixes: Tensor) -> None:
        """Take in prefixes `[n q h]`, n <= `free`, each with its ticket and the key of its image."""
        count, length = prefixes.shape[:2]
        if count > self.free:
            raise ValueError(f"{count} prefixes, but {self.free} free slots")
        self._allocate(prefixes)
        first = len(self._sequences)
        mine = slice(first, first + count)
        rotation = self._rotation[:, None, :length]  # [2 1 q d]
        hidden = prefixes
        for number, layer in enumerate(self.model.layers):
            query, key, value = self._project(layer, hidden, rotation)  # [n heads|kv_heads q d]
            self._cache[number, 0, mine, :, :length] = key
            self._cache[number, 1, mine, :, :length] = value
            attended = F.scaled_dot_product_attention(
                query, *map(self._repeated, (key, value)), is_causal=True
            )
            hidden = self._finish_layer(layer, hidden, attended.transpose(1, 2))
        self._sequences += [Running(*pair) for pair in zip(tickets, keys, strict=True)]
        self._position = length
        self._choose(hidden[:, -1], mine)

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """Add a token to every sequence; returns those that ended since the last call."""
        if self._sequences:
            self._choose(self._forward(), slice(0, len(self._sequences)))
        finished, self._finished = self._finished, []
        return finished

    def _forward(self) -> Tensor:
        """Feed every sequence its last token -> hidden states `[n h]`."""
        count = len(self._sequences)
        device = self._cache.device
        last = torch.tensor([s.ids[-1] for s in self._sequences], device=device)
        lengths = [len(s.ids) for s in self._sequences]
        positions = torch.tensor(lengths, device=device) + (self._position - 1)  # [n]
        end = self._position + max(lengths)
        mask = None  # needed only where some are further on than others
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
            # Query heads of one key head take the place of query positions: nothing is repeated.
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

    def _choose(self, hidden: Tensor, where: slice) -> None:
        """The next token of the sequences in `where`, whose last hidden states `[n h]` these are."""
        logits = self.lm_head(self._norm(self.model.norm, hidden))  # [n v]
        mine = self._sequences[where]
        ended = []
        for slot, (sequence, token) in enumerate(
            zip(mine, self._tokens(logits, mine), strict=True)
        ):
            reason: FinishReason | None = None
            if token == self.end_of_text:
                reason = "stop"
            else:
                sequence.ids.append(token)
                if len(sequence.ids) == self.max_new_tokens:
                    reason = "length"
            if reason:
                self._finished.append(Finished(sequence.ticket, sequence.ids, reason))
                ended.append(where.start + slot)
        self._close_gaps(ended)

    def _tokens(self, logits: Tensor, sequences: Sequence[Running]) -> list[int]:
        """The token that each sequence goes on with, by its logits `[n v]`."""
        if self.sampling is None:
            chosen = logits.argmax(-1)
        else:
            numbers = [len(s.ids) for s in sequences]
            chosen = self.sampling.draw(logits, [s.key for s in sequences], numbers)
        return chosen.tolist()

    def _close_gaps(self, ended: list[int]) -> None:
        """Take the slots `ended` out of use: the last slots in use move into the gaps."""
        for slot in reversed(ended):
            last = self._sequences.pop()
            if slot < (moved := len(self._sequences)):
                end = self._position + len(last.ids)
                self._cache[:, :, slot, :, :end] = self._cache[:, :, moved, :, :end]
                self._sequences[slot] = last

    def _allocate(self, prefixes: Tensor) -> None:
        """Make the cache when the first prefix tells length, device and dtype."""
        positions = prefixes.shape[1] + self.max_new_tokens - 1
        layers = len(self.model.layers)
        shape = (layers, 2, self.slots, self.kv_heads, positions, self.head_dim)
        if self._cache.shape == shape and self._cache.dtype == prefixes.dtype:
            return
        if self._sequences:
            raise ValueError("all prefixes have to be equally long and of one dtype")
        self._cache = prefixes.new_zeros(shape)
        everywhere = torch.arange(positions, device=prefixes.device)[None]
        cosines, sines = self.model.rotary_emb(prefixes, everywhere)  # [1 positions d] each
        # The half turn of `_rotated` has its sign here, once.
        sines[..., : self.head_dim // 2] *= -1
        self._rotation = torch.cat([cosines, sines])


def _rotated(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions on `[n heads t d]`: halves of a head are the two axes that turn."""
    cosines, sines = rotation
    return heads * cosines + heads.roll(heads.shape[-1] // 2, -1) * sines


def decode(decoder: SlotDecoder, keys: Sequence[int], prefixes: Tensor) -> list[Finished]:
    """All prefixes `[n q h]` through an empty decoder, in their order."""
    results: dict[int, Finished] = {}
    admitted = 0
    while admitted < len(keys) or decoder.busy:
        if count := min(decoder.free, len(keys) - admitted):
            rows = range(admitted, admitted + count)
            admitted += count
            decoder.admit(rows, keys[rows.start : admitted], prefixes[rows.start : admitted])
        results |= {finished.ticket: finished for finished in decoder.step()}
    return [results[i] for i in range(len(keys))]
