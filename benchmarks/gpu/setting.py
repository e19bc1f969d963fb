"""What all parts of the check share: size, device, and how a part fits the card's memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.training.models import SIZES, Size
from vlv_model.checkpoints import published

_SMALL_CARD = 70e9  # bytes: below it the reference's float32 step with 3B does not fit


@dataclass(frozen=True)
class Setting:
    """Size by name, the device, and which Qwen2.5 the full size takes (default: by the card)."""

    size_name: str
    device: torch.device
    chosen_model: str | None = None

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def language_model(self) -> str:
        """Of the full size: 3B, or 0.5B on a card of less than 70 GB."""
        if self.chosen_model or not self.on_cuda:
            return self.chosen_model or "3B"
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return "3B" if memory >= _SMALL_CARD else "0.5B"

    @property
    def size(self) -> Size:
        """The models' configurations and the rows of a step, which are fewer on a small card."""
        size = SIZES[self.size_name]
        if self.size_name != "full" or self.language_model == "3B":
            return size
        qwen = published.QWEN_25[self.language_model]
        return replace(size, language_model=qwen, batch=(2, 2))
