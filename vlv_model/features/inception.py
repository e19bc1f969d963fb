"""Inception v3 as the Fréchet Inception Distance uses it (Heusel et al., arXiv 1706.08500).

The weights are those of TensorFlow's inception-2015-12-05 in the layout of pytorch-fid's
`pt_inception-2015-12-05-6726825d.pth` (torch-fidelity publishes the same file). The network differs
from torchvision's in its average pools, which leave the padding out, and in Mixed_7c, which has a
maximum pool in its branch. Names of the modules are those of the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlv_model.checkpoints.digests import sha256_of
from vlv_model.errors import ModelError
from vlv_model.features.settings import Resize
from vlv_model.reference.state_dicts import read_state_dict

WIDTH = 2048
SIDE = 299  # pixels that the network takes
_CLASSES = 1008
URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
DIGEST = "6726825d"
"""First digits of the published file's SHA-256, as in its name."""

Pool = Callable[[Tensor], Tensor]


def average_pool(x: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels, those outside the picture left out."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BasicConv2d(nn.Module):
    """Convolution, batch norm with fixed statistics, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Any, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Branches over the same pixels, whose channels are concatenated.

    `branches` names the convolutions of each branch in their order.
    """

    branches: tuple[tuple[str, ...], ...]

    def __init__(self, pool: Pool | None = average_pool) -> None:
        super().__init__()
        self.pool = pool

    def run(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.run(names, x) for names in self.branches]
        if self.pool is None:  # a block that halves the sides
            outputs.append(F.max_pool2d(x, 3, stride=2))
        else:
            outputs.append(self.run(("branch_pool",), self.pool(x)))
        return torch.cat(outputs, 1)


class BlockA(Block):
    branches = (
        ("branch1x1",),
        ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    )

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(channels, pooled, 1)


class BlockB(Block):
    branches = (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))

    def __init__(self, channels: int) -> None:
        super().__init__(pool=None)
        self.branch3x3 = BasicConv2d(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)


class BlockC(Block):
    branches = (
        ("branch1x1",),
        ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
        tuple(f"branch7x7dbl_{i}" for i in range(1, 6)),
    )

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        row: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = BasicConv2d(channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(channels, inner, 1)
        self.branch7x7_2 = BasicConv2d(inner, inner, **row)
        self.branch7x7_3 = BasicConv2d(inner, 192, **column)
        self.branch7x7dbl_1 = BasicConv2d(channels, inner, 1)
        self.branch7x7dbl_2 = BasicConv2d(inner, inner, **column)
        self.branch7x7dbl_3 = BasicConv2d(inner, inner, **row)
        self.branch7x7dbl_4 = BasicConv2d(inner, inner, **column)
        self.branch7x7dbl_5 = BasicConv2d(inner, 192, **row)
        self.branch_pool = BasicConv2d(channels, 192, 1)


class BlockD(Block):
    branches = (
        ("branch3x3_1", "branch3x3_2"),
        ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
    )

    def __init__(self, channels: int) -> None:
        super().__init__(pool=None)
        self.branch3x3_1 = BasicConv2d(channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)


class BlockE(Block):
    branches = (
        ("branch1x1",),
        ("branch3x3_1", "branch3x3_2a"),
        ("branch3x3_1", "branch3x3_2b"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3b"),
    )

    def __init__(self, channels: int, pool: Pool) -> None:
        super().__init__(pool)
        row: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1)}
        column: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = BasicConv2d(channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, **row)
        self.branch3x3_2b = BasicConv2d(384, 384, **column)
        self.branch3x3dbl_1 = BasicConv2d(channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, **row)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, **column)
        self.branch_pool = BasicConv2d(channels, 192, 1)


class InceptionV3(nn.Module):
    """`[b 3 299 299]` in [-1, 1] -> the last average pool, `[b 2048]`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = BlockA(192, pooled=32)
        self.Mixed_5c = BlockA(256, pooled=64)
        self.Mixed_5d = BlockA(288, pooled=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, inner=128)
        self.Mixed_6c = BlockC(768, inner=160)
        self.Mixed_6d = BlockC(768, inner=160)
        self.Mixed_6e = BlockC(768, inner=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, maximum_pool)
        # Of the classifier, which features do not use: the published file has it.
        self.fc = nn.Linear(WIDTH, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)  # [b 64 73 73]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # [b 192 35 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)  # [b 768 17 17]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7a(x)  # [b 1280 8 8]
        x = self.Mixed_7c(self.Mixed_7b(x))  # [b 2048 8 8]
        return x.mean((2, 3))


def load_inception(path: str) -> tuple[InceptionV3, str]:
    """The network with the weights of a file, and the file's SHA-256.

    Raises ModelError for a file that is missing or of another layout, and CheckpointError for one that
    is no state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(
            f"embed.weights={path} does not exist: expected the FID weights, "
            f"pt_inception-2015-12-05-{DIGEST}.pth, from {URL} (SHA-256 {DIGEST}…)"
        )
    network = InceptionV3()
    _load_strictly(network, read_state_dict(file), path)
    return network, sha256_of(file)


def _load_strictly(network: InceptionV3, tensors: Mapping[str, Tensor], path: str) -> None:
    # Counters of training, which files of other torch versions lack.
    tensors = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    expected = {
        name: value.shape
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        wrong = sorted(n for n in {**expected, **found} if expected.get(n) != found.get(n))
        raise ModelError(
            f"embed.weights={path} is not the FID Inception v3: {len(wrong)} of its tensors differ, "
            f"such as {wrong[0]}: expected the layout of pytorch-fid's file, {URL}"
        )
    network.load_state_dict(tensors, strict=False)


# -------------------------------------------------------------------------------------- pixels


def inception_pixels(pixels: Tensor, resize: Resize) -> Tensor:
    """uint8 `[b 3 h w]` -> float32 `[b 3 299 299]`, resized and scaled as the named library does.

    None of the first two smooths before it shrinks: that is how published distances were computed.

    pytorch: pytorch-fid. `F.interpolate`, bilinear between pixel centres; x / 127.5 - 1.
    tensorflow: torch-fidelity and the original. TensorFlow 1's bilinear, whose pixel i lies at
        i · size / 299, without the half pixel; (x - 128) / 128.
    clean: clean-fid (Parmar et al., arXiv 2104.11222). Pillow's bicubic filter in float, clipped to
        [0, 255]; (x - 128) / 128.
    """
    x = pixels.float()
    if resize == "pytorch":
        return _interpolate(x, mode="bilinear").div_(127.5).sub_(1)
    if resize == "tensorflow":
        return _tensorflow_bilinear(x).sub_(128).div_(128)
    # In float, torch's antialiased bicubic is Pillow's filter.
    return _interpolate(x, mode="bicubic", antialias=True).clamp_(0, 255).sub_(128).div_(128)


def _interpolate(x: Tensor, **how: Any) -> Tensor:
    return F.interpolate(x, size=(SIDE, SIDE), align_corners=False, **how)


def _tensorflow_bilinear(x: Tensor) -> Tensor:
    for dimension in (2, 3):
        size = x.shape[dimension]
        position = torch.arange(SIDE, dtype=torch.float32, device=x.device) * (size / SIDE)
        before = position.floor().long()
        after = (before + 1).clamp(max=size - 1)
        shape = [SIDE if d == dimension else 1 for d in range(4)]
        weight = (position - before).view(shape)
        low, high = x.index_select(dimension, before), x.index_select(dimension, after)
        x = low + (high - low) * weight
    return x
