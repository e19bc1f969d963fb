"""What a diffusion decoder is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The text encoders' outputs, which a denoiser attends to and is modulated by."""

    embeddings: Tensor  # `[b n d]`
    pooled: Tensor | None = None  # `[b p]`; Stable Diffusion 2.1 has none
    time_ids: Tensor | None = None  # int `[b 6]`, SDXL's sizes; by default those of the square

    @classmethod
    def of(cls, value: Condition | Tensor) -> Condition:
        """`value`; a tensor stands for embeddings alone."""
        return value if isinstance(value, Condition) else cls(value)

    def expand(self, rows: int) -> Condition:
        """The same condition for `rows` rows, where it has one."""
        values = (self.embeddings, self.pooled, self.time_ids)
        embeddings, pooled, time_ids = (
            None if value is None else value.expand(rows, *value.shape[1:]) for value in values
        )
        assert embeddings is not None
        return Condition(embeddings, pooled, time_ids)
