"""FID's Inception v3 against a second, plain forward over a state dict of the published layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlv_model.errors import ModelError
from vlv_model.features.extractors import load_extractor
from vlv_model.features.inception import SIDE, inception_pixels, load_inception
from vlv_model.features.settings import ExtractorConfig

# Convolutions as (name, in, out, (height, width)), in the order of the published code.
_A = [
    ("branch1x1", 0, 64, (1, 1)), ("branch5x5_1", 0, 48, (1, 1)), ("branch5x5_2", 48, 64, (5, 5)),
    ("branch3x3dbl_1", 0, 64, (1, 1)), ("branch3x3dbl_2", 64, 96, (3, 3)), ("branch3x3dbl_3", 96, 96, (3, 3)),
]  # fmt: skip
_B = [
    ("branch3x3", 0, 384, (3, 3)), ("branch3x3dbl_1", 0, 64, (1, 1)), ("branch3x3dbl_2", 64, 96, (3, 3)),
    ("branch3x3dbl_3", 96, 96, (3, 3)),
]  # fmt: skip
_D = [
    ("branch3x3_1", 0, 192, (1, 1)), ("branch3x3_2", 192, 320, (3, 3)), ("branch7x7x3_1", 0, 192, (1, 1)),
    ("branch7x7x3_2", 192, 192, (1, 7)), ("branch7x7x3_3", 192, 192, (7, 1)), ("branch7x7x3_4", 192, 192, (3, 3)),
]  # fmt: skip
_E = [
    ("branch1x1", 0, 320, (1, 1)), ("branch3x3_1", 0, 384, (1, 1)), ("branch3x3_2a", 384, 384, (1, 3)),
    ("branch3x3_2b", 384, 384, (3, 1)), ("branch3x3dbl_1", 0, 448, (1, 1)), ("branch3x3dbl_2", 448, 384, (3, 3)),
    ("branch3x3dbl_3a", 384, 384, (1, 3)), ("branch3x3dbl_3b", 384, 384, (3, 1)), ("branch_pool", 0, 192, (1, 1)),
]  # fmt: skip


def _c(inner: int) -> list[tuple[str, int, int, tuple[int, int]]]:
    return [
        ("branch1x1", 0, 192, (1, 1)), ("branch7x7_1", 0, inner, (1, 1)),
        ("branch7x7_2", inner, inner, (1, 7)), ("branch7x7_3", inner, 192, (7, 1)),
        ("branch7x7dbl_1", 0, inner, (1, 1)), ("branch7x7dbl_2", inner, inner, (7, 1)),
        ("branch7x7dbl_3", inner, inner, (1, 7)), ("branch7x7dbl_4", inner, inner, (7, 1)),
        ("branch7x7dbl_5", inner, 192, (1, 7)), ("branch_pool", 0, 192, (1, 1)),
    ]  # fmt: skip


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of pt_inception-2015-12-05-6726825d.pth, written out."""
    convolutions = [
        ("Conv2d_1a_3x3", 3, 32, (3, 3)), ("Conv2d_2a_3x3", 32, 32, (3, 3)),
        ("Conv2d_2b_3x3", 32, 64, (3, 3)), ("Conv2d_3b_1x1", 64, 80, (1, 1)),
        ("Conv2d_4a_3x3", 80, 192, (3, 3)),
    ]  # fmt: skip
    for block, channels, parts in [
        ("Mixed_5b", 192, [*_A, ("branch_pool", 0, 32, (1, 1))]),
        ("Mixed_5c", 256, [*_A, ("branch_pool", 0, 64, (1, 1))]),
        ("Mixed_5d", 288, [*_A, ("branch_pool", 0, 64, (1, 1))]),
        ("Mixed_6a", 288, _B),
        ("Mixed_6b", 768, _c(128)), ("Mixed_6c", 768, _c(160)), ("Mixed_6d", 768, _c(160)),
        ("Mixed_6e", 768, _c(192)),
        ("Mixed_7a", 768, _D), ("Mixed_7b", 1280, _E), ("Mixed_7c", 2048, _E),
    ]:  # fmt: skip
        convolutions += [(f"{block}.{n}", i or channels, o, k) for n, i, o, k in parts]
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, inputs, outputs, kernel in convolutions:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, *kernel)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (outputs,)
    return shapes


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in published_shapes().items():
        if name.endswith("running_var"):
            tensors[name] = torch.rand(shape, generator=generator) + 0.5
        elif name.endswith("bn.weight"):
            tensors[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        elif name.endswith(("bias", "running_mean")):
            tensors[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            scale = (2 / np.prod(shape[1:])) ** 0.5
            tensors[name] = scale * torch.randn(shape, generator=generator)
    file = tmp_path_factory.mktemp("inception") / "pt_inception-random.pth"
    torch.save(tensors, file)
    return file


def plain_forward(t: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published forward, straight from the tensors: no module, no table of branches."""

    def conv(name: str, x: Tensor, **how: object) -> Tensor:
        x = F.conv2d(x, t[f"{name}.conv.weight"], **how)  # type: ignore[arg-type]
        mean, var = t[f"{name}.bn.running_mean"], t[f"{name}.bn.running_var"]
        scale = t[f"{name}.bn.weight"] / (var + 0.001).sqrt()
        shift = t[f"{name}.bn.bias"] - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).relu()

    def pool(x: Tensor) -> Tensor:
        # The mean of the pixels that there are, counted by pooling ones.
        ones = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1) / ones

    def a(n: str, x: Tensor) -> Tensor:
        five = conv(f"{n}.branch5x5_2", conv(f"{n}.branch5x5_1", x), padding=2)
        three = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), padding=1)
        three = conv(f"{n}.branch3x3dbl_3", three, padding=1)
        return torch.cat(
            [conv(f"{n}.branch1x1", x), five, three, conv(f"{n}.branch_pool", pool(x))], 1
        )

    def b(n: str, x: Tensor) -> Tensor:
        three = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), padding=1)
        three = conv(f"{n}.branch3x3dbl_3", three, stride=2)
        return torch.cat([conv(f"{n}.branch3x3", x, stride=2), three, F.max_pool2d(x, 3, 2)], 1)

    def c(n: str, x: Tensor) -> Tensor:
        row, column = (0, 3), (3, 0)
        seven = conv(f"{n}.branch7x7_2", conv(f"{n}.branch7x7_1", x), padding=row)
        seven = conv(f"{n}.branch7x7_3", seven, padding=column)
        double = conv(f"{n}.branch7x7dbl_1", x)
        for i, padding in ((2, column), (3, row), (4, column), (5, row)):
            double = conv(f"{n}.branch7x7dbl_{i}", double, padding=padding)
        return torch.cat(
            [conv(f"{n}.branch1x1", x), seven, double, conv(f"{n}.branch_pool", pool(x))], 1
        )

    def d(n: str, x: Tensor) -> Tensor:
        three = conv(f"{n}.branch3x3_2", conv(f"{n}.branch3x3_1", x), stride=2)
        seven = conv(f"{n}.branch7x7x3_2", conv(f"{n}.branch7x7x3_1", x), padding=(0, 3))
        seven = conv(f"{n}.branch7x7x3_3", seven, padding=(3, 0))
        return torch.cat(
            [three, conv(f"{n}.branch7x7x3_4", seven, stride=2), F.max_pool2d(x, 3, 2)], 1
        )

    def e(n: str, x: Tensor, pooled: Tensor) -> Tensor:
        three = conv(f"{n}.branch3x3_1", x)
        double = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), padding=1)
        return torch.cat(
            [
                conv(f"{n}.branch1x1", x),
                conv(f"{n}.branch3x3_2a", three, padding=(0, 1)),
                conv(f"{n}.branch3x3_2b", three, padding=(1, 0)),
                conv(f"{n}.branch3x3dbl_3a", double, padding=(0, 1)),
                conv(f"{n}.branch3x3dbl_3b", double, padding=(1, 0)),
                conv(f"{n}.branch_pool", pooled),
            ],
            1,
        )

    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, stride=2))
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x, padding=1), 3, 2)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = a(name, x)
    x = b("Mixed_6a", x)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = c(name, x)
    x = d("Mixed_7a", x)
    x = e("Mixed_7b", x, pool(x))
    x = e("Mixed_7c", x, F.max_pool2d(x, 3, 1, 1))
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def test_the_network_is_the_published_one(weights: Path) -> None:
    config = ExtractorConfig(extractor="inception", weights=str(weights), image_size=64)
    extractor = load_extractor(config)
    # As published: 23,834,568 of torchvision's without its second head, and 8 further classes.
    assert sum(p.numel() for p in extractor.parameters()) == 23_834_568 + 8 * 2049
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), generator=generator, dtype=torch.uint8)
    features = extractor.describe(pixels)["features"]
    resized = F.interpolate(
        pixels.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False
    )
    expected = plain_forward(torch.load(weights), 2 * resized - 1)
    assert features.shape == (1, 2048)
    assert expected.std() > 0.01
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    assert extractor.identity["weights"].startswith("sha256:")


def test_each_resizing_is_that_of_its_library() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 40, 500), np.uint8))
    # TensorFlow 1: source pixel i · size / 299, no half pixel; by hand in float64.
    picture = pixels[0].double().numpy()
    for size, axis in ((40, 1), (500, 2)):
        at = np.arange(SIDE) * size / SIDE
        low = at.astype(int)
        high = np.minimum(low + 1, size - 1)
        weight = (at - low).reshape(-1, *[1] * (2 - axis))
        picture = picture.take(low, axis) * (1 - weight) + picture.take(high, axis) * weight
    found = inception_pixels(pixels, "tensorflow")[0]
    assert np.abs(found.numpy() - (picture - 128) / 128).max() < 1e-3
    # clean-fid: Pillow's bicubic on each channel as floats.
    channels = [Image.fromarray(c.astype(np.float32)) for c in pixels[0].numpy()]
    clean = [np.asarray(c.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for c in channels]
    expected = (np.stack(clean).clip(0, 255) - 128) / 128
    assert np.abs(inception_pixels(pixels, "clean")[0].numpy() - expected).max() < 1e-3
    # pytorch-fid's differs from both.
    pytorch = inception_pixels(pixels, "pytorch")[0].numpy()
    assert np.abs(pytorch - found.numpy()).max() > 0.1


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"expected the FID weights, pt_inception.*from https://.*6726825d"
    ):
        load_inception(str(tmp_path / "none.pth"))
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"is not the FID Inception v3: .* of its tensors differ"):
        load_inception(str(tmp_path / "other.pth"))
