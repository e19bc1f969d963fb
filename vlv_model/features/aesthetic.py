"""LAION's aesthetic predictors: heads on normalised CLIP ViT-L/14 image embeddings.

v1 (LAION-AI/aesthetic-predictor, sa_0_4_vit_l_14_linear.pth) is one linear layer. v2
(christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth), which scored
LAION-Aesthetics v2, has five without an activation between them; its dropout does nothing here.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlv_model.checkpoints.digests import sha256_of
from vlv_model.errors import ModelError
from vlv_model.reference.state_dicts import read_state_dict

SOURCES = {
    "v1": "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    "v2": "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac+logos+ava1-l14-linearMSE.pth",
}
_V1 = [""]
_V2 = [f"layers.{i}." for i in (0, 2, 4, 6, 7)]


class AestheticHead(nn.Module):
    """Embeddings `[b d]` -> scores `[b]`, about 1 to 10."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.width = layers[0].in_features

    @property
    def version(self) -> str:
        return "v1" if len(self.layers) == 1 else "v2"

    def forward(self, embeddings: Tensor) -> Tensor:
        # The layers are those of the file, in float32: an error of 1 % moves rows over a bound.
        scores: Tensor = self.layers(F.normalize(embeddings.float(), dim=-1))
        return scores.squeeze(-1)


def load_head(path: str) -> tuple[AestheticHead, str]:
    """A head of either version, recognised by its tensors, and its file's SHA-256.

    Raises ModelError for a file that is missing or no such head.
    """
    file = Path(path)
    if not file.is_file():
        known = " or ".join(f"{url} ({version})" for version, url in SOURCES.items())
        raise ModelError(f"embed.head={path} does not exist: expected the file of {known}")
    tensors = read_state_dict(file)
    prefixes = _V1 if "weight" in tensors else _V2
    names = {f"{prefix}{kind}" for prefix in prefixes for kind in ("weight", "bias")}
    layers = []
    if tensors.keys() == names:
        for prefix in prefixes:
            weight, bias = tensors[f"{prefix}weight"], tensors[f"{prefix}bias"]
            if weight.ndim != 2 or bias.shape != weight.shape[:1]:
                break
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            layers.append(layer)
    widths = [(layer.in_features, layer.out_features) for layer in layers]
    follow = all(a[1] == b[0] for a, b in pairwise(widths))
    if len(layers) != len(prefixes) or not follow or widths[-1][1] != 1:
        raise ModelError(
            f"embed.head={path} is not an aesthetic head of LAION: expected `weight` and `bias` (v1), or "
            f"those of layers 0, 2, 4, 6 and 7 (v2); it has {', '.join(sorted(tensors)[:6])}"
        )
    return AestheticHead(layers), sha256_of(file)
