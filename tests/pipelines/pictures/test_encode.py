"""The stored picture: its size, its format, and which files are kept unchanged."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.pictures.decode import (
    DecodeError,
)
from pipelines.pictures.encode import ImageConfig
from tests.pipelines.pictures.files import encoded, photo, photograph, pixels, store

# ----------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("center_crop", (40, 40)),
        ("keep_ratio", (60, 40)),
        ("keep_ratio_largest", (40, 27)),
        ("border", (40, 40)),
        ("no", (120, 80)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_resize_modes(mode: Any, expected: tuple[int, int], kind: str) -> None:
    config = ImageConfig(size=40, resize=mode, format="png")
    found = pixels(encoded(photo(), kind), config)
    assert found.shape == (expected[1], expected[0], 3)
    if mode == "border":
        assert found[0].min() == found[-1].min() == 255  # white above and below
    if mode == "center_crop":  # the middle of 120 px: red from 42 to 212
        assert 35 < found[20, 0, 0] < 50
        assert 205 < found[20, -1, 0] < 220


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["center_crop", "keep_ratio", "keep_ratio_largest", "border"])
def test_orientation_and_scaled_decoding_do_not_change_the_size(
    mode: Any, orientation: int
) -> None:
    """Sizes are rounded, and crops placed, in the upright full-size picture."""
    turn = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    upright = photo(641, 480)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright if turn is None else upright.transpose(Image.Transpose(turn))
    config = ImageConfig(size=67, resize=mode, format="png")
    for kind, tolerance in (("PNG", 1), ("JPEG", 8)):
        found = pixels(encoded(turned, kind, exif=exif), config).astype(int)
        expected = pixels(encoded(upright), config).astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance


def test_a_border_is_white_with_any_profile() -> None:
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    yellowish = srgb.replace("sRGB".encode("utf-16-be"), "RGBs".encode("utf-16-be"))  # its name
    entry = yellowish.index(b"bXYZ")
    blue = int.from_bytes(yellowish[entry + 4 : entry + 8], "big")
    yellowish[blue + 16 : blue + 20] = (20_000).to_bytes(4, "big")  # less light of blue
    data = encoded(Image.new("RGB", (40, 20), "white"), icc_profile=bytes(yellowish))
    found = pixels(data, ImageConfig(size=40, resize="border", format="png"))
    assert found[20, 20].min() < 250  # the profile counts
    assert found[:9].min() == found[-9:].min() == 255


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("center_crop", (80, 80)),
        ("keep_ratio", (120, 80)),
        ("keep_ratio_largest", (120, 80)),
        ("border", (500, 500)),
    ],
)
def test_small_images_are_not_enlarged(mode: Any, expected: tuple[int, int]) -> None:
    config = ImageConfig(size=500, resize=mode, format="png")
    assert pixels(encoded(photo()), config).shape == (*expected[::-1], 3)


def test_enlarging_on_request() -> None:
    config = ImageConfig(size=160, resize="keep_ratio", enlarge=True, format="png")
    assert pixels(encoded(photo()), config).shape == (160, 240, 3)


def test_enlarging_a_line_fails() -> None:
    config = ImageConfig(size=512, enlarge=True)
    assert store(encoded(Image.new("RGB", (1, 1))), config).width == 512
    with pytest.raises(DecodeError, match="1x3000 grows 512 times"):
        store(encoded(Image.new("RGB", (1, 3000))), config)


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
@pytest.mark.parametrize("mode", ["center_crop", "keep_ratio", "keep_ratio_largest", "border"])
def test_extreme_shapes_keep_a_pixel(size: tuple[int, int], mode: Any) -> None:
    found = pixels(encoded(Image.new("RGB", size)), ImageConfig(size=64, resize=mode))
    assert min(found.shape[:2]) >= 1


def test_scaled_jpeg_decoding_gives_the_same_picture() -> None:
    noise = np.random.default_rng(0).normal(0, 8, (1200, 1600, 3))
    big = np.asarray(photo(1600, 1200)).astype(float) + noise
    image = Image.fromarray(big.clip(0, 255).astype(np.uint8))
    config = ImageConfig(size=150, resize="keep_ratio", format="png")
    scaled = pixels(encoded(image, "JPEG", quality=95), config).astype(int)
    whole = pixels(encoded(image, "PNG"), config).astype(int)
    assert np.abs(scaled - whole).mean() < 1.5


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"keep_rgb": True},
        {"restart_marker_blocks": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [20, 37, 64])
def test_both_jpeg_decoders_give_the_same_picture(options: dict[str, Any], side: int) -> None:
    data = encoded(photo(173, 131), "JPEG", quality=95, **options)
    config = ImageConfig(size=side, format="png")
    quick = pixels(data, config).astype(int)
    lenient = pixels(data, config, quick_jpeg=False).astype(int)
    assert np.abs(quick - lenient).mean() < 1
    assert np.abs(quick - lenient).max() < 16


def pattern(period: int) -> Image.Image:
    """Vertical black and white stripes, a pair of them `period` pixels wide; 0: noise."""
    picture = np.zeros((240, 240, 3), np.uint8)
    if period:
        picture[:, np.arange(240) % period < period / 2] = 255
    else:
        picture[:] = np.random.default_rng(0).integers(0, 256, picture.shape, np.uint8)
    return Image.fromarray(picture)


def contrast(image: Image.Image, size: int, by: Image.Resampling | None = None) -> float:
    """The contrast of a pattern at another size: ours, or that of a filter of Pillow's."""
    if by is None:
        found = pixels(encoded(image), ImageConfig(size=size, format="png"))
    else:
        found = np.asarray(image.resize((size, size), by))
    return float(found[:, 2:-2].std())


@pytest.mark.parametrize("size", [60, 119, 125, 150, 180, 200])
def test_stripes_finer_than_the_new_size_fade(size: int) -> None:
    """The contrast that remains is no higher than with a windowed filter."""
    stripes = pattern(2)
    assert contrast(stripes, size) <= contrast(stripes, size, Image.Resampling.HAMMING) + 0.5


@pytest.mark.parametrize("size", [70, 80, 81, 83, 92, 104, 117, 120, 130, 160])
@pytest.mark.parametrize("period", [2, 3, 4, 5, 7, 0])
def test_patterns_fade_as_with_area_averages(size: int, period: int) -> None:
    """For stripes of any width, and for noise, or with a windowed filter."""
    image = pattern(period)
    others = (Image.Resampling.BOX, Image.Resampling.HAMMING)
    most = max(contrast(image, size, other) for other in others)
    assert contrast(image, size) <= 1.05 * most + 1


@pytest.mark.parametrize("size", [70, 80, 81, 83, 104, 120, 160, 200])
@pytest.mark.parametrize("period", [10, 12, 16])
def test_patterns_that_the_new_size_can_show_stay(size: int, period: int) -> None:
    image = pattern(period)
    windowed = contrast(image, size, Image.Resampling.HAMMING)
    assert contrast(image, size) >= 0.85 * windowed


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
def test_stored_formats(kind: Any) -> None:
    stored = store(encoded(photo()), ImageConfig(size=64, format=kind))
    assert Image.open(io.BytesIO(stored.data)).format == kind.upper()


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
@pytest.mark.parametrize("mode", ["center_crop", "keep_ratio", "keep_ratio_largest", "border"])
def test_files_that_need_no_change_are_kept(mode: Any, kind: Any) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(photo(64, 64), kind.upper(), exif=exif, icc_profile=srgb)
    config = ImageConfig(size=64, resize=mode, format=kind)
    assert store(data, config).data == data
    anew = store(data, config.model_copy(update={"reencode": "always"})).data
    assert anew != data
    assert not Image.open(io.BytesIO(anew)).getexif()


@pytest.mark.parametrize(
    "data",
    [
        encoded(photo(64, 65), "JPEG"),
        encoded(photo(65, 65), "JPEG"),
        encoded(photo(64, 64), "PNG"),
        encoded(photo(64, 64).convert("L"), "JPEG"),
        encoded(photo(64, 64).convert("CMYK"), "JPEG"),
        encoded(
            photo(64, 64),
            "JPEG",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0",
        ),
        encoded(
            photo(64, 64),
            "JPEG",
            icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes(),
        ),
    ],
    ids=["crop", "size", "format", "grey", "cmyk", "turned", "xyz"],
)
def test_files_that_need_a_change_are_encoded_again(data: bytes) -> None:
    stored = Image.open(io.BytesIO(store(data, ImageConfig(size=64)).data))
    assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (64, 64))
    assert not stored.getexif()


def test_reencode_never_keeps_every_valid_file() -> None:
    config = ImageConfig(resize="no", reencode="never")
    for kind in ("GIF", "TIFF", "JPEG"):
        data = encoded(photo(50, 30), kind)
        stored = store(data, config)
        assert (stored.data, stored.width, stored.height) == (data, 50, 30)
    with pytest.raises(DecodeError):
        store(encoded(photo(), "JPEG")[:-200], config)
    with pytest.raises(ValueError, match=r"add image\.resize=no"):
        ImageConfig(reencode="never")


def test_quality_is_a_setting() -> None:
    sizes = [len(store(encoded(photo()), ImageConfig(quality=q)).data) for q in (20, 95)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("factor", [1.25, 1.35, 1.5, 1.75, 1.95])
@pytest.mark.parametrize("pattern", ["rows", "columns", "squares"])
def test_patterns_that_a_size_cannot_show_become_grey_without_moire(
    factor: float, pattern: str
) -> None:
    """Patterns that alternate from pixel to pixel have no more contrast than with Lanczos."""
    y, x = np.mgrid[:320, :320]
    lines = {"rows": y, "columns": x, "squares": x + y}[pattern] % 2 * 255
    image = Image.fromarray(lines.astype(np.uint8)).convert("RGB")
    size = round(320 / factor)
    found = pixels(encoded(image), ImageConfig(size=size, format="png")).astype(int)
    lanczos = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(found - 127.5).mean() <= np.abs(lanczos - 127.5).mean() + 6


@pytest.mark.parametrize("factor", [1.1, 1.3, 1.6, 1.9, 2.5, 4.0])
def test_smaller_pictures_are_close_to_lanczos(factor: float) -> None:
    image = photograph(600, 400)
    size = round(400 / factor)
    config = ImageConfig(size=size, resize="keep_ratio", format="png")
    found = pixels(encoded(image), config).astype(int)
    lanczos = image.resize(found.shape[1::-1], Image.Resampling.LANCZOS)
    areas = image.resize(found.shape[1::-1], Image.Resampling.BOX)
    apart = np.abs(found - np.asarray(lanczos)).mean()
    assert apart <= 1.1 * np.abs(np.asarray(areas).astype(int) - np.asarray(lanczos)).mean()
