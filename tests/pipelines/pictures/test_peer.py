"""Compares pictures with img2dataset's: the same resize modes under the same names."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from pipelines.pictures.decode import ImageFile
from pipelines.pictures.encode import ImageConfig, ResizeMode
from tests.pipelines.pictures.files import encoded, photograph

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
resizer = pytest.importorskip("img2dataset.resizer")

SIZE = 256
MODES: list[ResizeMode] = ["center_crop", "keep_ratio", "keep_ratio_largest", "border"]


def smooth_picture(width: int, height: int) -> bytes:
    """A JPEG of waves in three directions: detail everywhere, none finer than the filter."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 23 + y / 41), np.sin(x / 37 - y / 19), np.sin((x + y) / 53)]
    pixels = np.stack([(wave * 100 + 128).astype(np.uint8) for wave in waves], axis=-1)
    return encoded(Image.fromarray(pixels), "JPEG", quality=95)


def both(data: bytes, mode: ResizeMode) -> tuple[np.ndarray, np.ndarray]:
    """(ours, the peer's) as RGB arrays of one shape."""
    ours = ImageFile(data, 10**8).store(ImageConfig(size=SIZE, resize=mode, format="png"))
    peer = resizer.Resizer(
        image_size=SIZE,
        resize_mode=mode,
        resize_only_if_bigger=False,
        encode_format="png",
        encode_quality=1,
    )
    stored, *_, error = peer(io.BytesIO(data))
    assert error is None
    one, other = (
        np.asarray(Image.open(io.BytesIO(b)).convert("RGB"), np.float64)
        for b in (ours.data, stored)
    )
    assert one.shape == other.shape
    return one, other


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio, in dB."""
    return float(10 * np.log10(255**2 / max(np.mean((one - other) ** 2), 1e-12)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(900, 600), (601, 1203), (512, 512)])
def test_pictures_equal_img2datasets(mode: ResizeMode, shape: tuple[int, int]) -> None:
    one, other = both(smooth_picture(*shape), mode)
    assert psnr(one, other) > 35


@pytest.mark.parametrize("source", ["made", "shared"])
def test_photographs_equal_img2datasets(source: str, request: pytest.FixtureRequest) -> None:
    if source == "made":
        sizes = [(640, 480), (427, 640), (500, 333), (612, 612)]
        photographs = [encoded(photograph(*size), "JPEG", quality=90) for size in sizes]
    else:
        folder = request.getfixturevalue("shared_dir") / "photos/images"
        photographs = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))[:20]]
    assert photographs
    values = [psnr(*both(photo, "center_crop")) for photo in photographs]
    assert np.median(values) > 30
    assert min(values) > 22
