"""TIFFs that Pillow misreads or refuses, compared with the values that were written."""

from __future__ import annotations

import base64
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipelines.pictures.decode import FAILURE_CLASSES, DecodeError, ImageFile
from tests.pipelines.pictures.files import LOSSLESS, photo
from tests.pipelines.pictures.nasty import ODD_TIFFS
from tests.pipelines.pictures.tiffs import PACKINGS, Tiff, as_type, colours

TIFFFILE = """
SUkqAAgAAAAPAAABBAABAAAAAwAAAAEBBAABAAAAAgAAAAIBAwADAAAAwgAAAAMBAwABAAAACAAAAAYBAwABAAAAAgAAABEBBAAB
AAAA4AAAABUBAwABAAAAAwAAABYBBAABAAAAAgAAABcBBAABAAAAQAAAABoBBQABAAAAyAAAABsBBQABAAAA0AAAABwBAwABAAAA
AQAAACgBAwABAAAAAQAAAD0BAwABAAAAAwAAAFMBAwADAAAA2AAAAAAAAAAgACAAIAABAAAAAQAAAAEAAAABAAAAAwADAAMAAAB4
nGOwtbVjZGRgYDhktMmEYVlDUpSPHMMWhmUMj6J85Bm3ghn29vYMYHDi+jNdENBTU1OFMJYvX6YLBgC3LxNN"""
FLOATS = ["float16", "float32", "float64"]
ODD = [*FLOATS, "uint32", "uint64"]


def picture(data: bytes, max_pixels: int = 10**6) -> np.ndarray:
    return ImageFile(data, max_pixels).picture()


def on_white(shares: np.ndarray) -> np.ndarray:
    """[h w 3] of 0 to 255 of shares [h w c], of which the last of 2 or 4 is alpha."""
    channels = shares.shape[-1]
    seen = shares[..., :1].repeat(3, -1) if channels < 3 else shares[..., :3]
    alpha = shares[..., -1:] if channels in (2, 4) else 1
    return 255 * (seen * alpha + 1 - alpha)


def failure(data: bytes, max_pixels: int = 10**6) -> str:
    with pytest.raises(DecodeError) as raised:
        ImageFile(data, max_pixels).store(LOSSLESS)
    return raised.value.kind


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ODD)
def test_values_of_many_bits(dtype: str, channels: int) -> None:
    values = as_type(colours(channels), dtype)
    expected = on_white(colours(channels))
    predictors = (1, 2, 3) if dtype in FLOATS else (1, 2)
    packings = PACKINGS if (dtype, channels) == ("float32", 3) else (8,)
    for compression, predictor, planar in product(packings, predictors, (False, True)):
        if predictor > 1 and compression in (1, 32773):  # which have none
            continue
        for tile, order in ((None, "<"), ((32, 16), ">")):
            way = Tiff(compression, predictor, planar, tile, order=order)
            found = picture(way.write(values))
            assert np.abs(found - expected).max() <= 2, way


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", PACKINGS)
def test_planes_of_16_bits(compression: int, order: str) -> None:
    """Pillow would read low bytes, or the next row, as pixels."""
    values = as_type(colours(3), "uint16")
    for tile in (None, (16, 32)):
        found = picture(Tiff(compression, planar=True, tile=tile, order=order).write(values))
        assert (found == values >> 8).all()


def test_big_tiffs() -> None:
    values = as_type(colours(3), "float32")
    for order in "<>":
        assert (
            np.abs(picture(Tiff(8, big=True, order=order).write(values)) - 255 * values).max() <= 1
        )


def test_a_file_of_another_writer() -> None:
    """[2 3 3] float32 from 0 to 1 by Deflate with the predictor of floats, written by tifffile."""
    data = base64.b64decode(TIFFFILE)
    expected = 255 * np.linspace(0, 1, 18).reshape(2, 3, 3)
    assert np.abs(picture(data) - expected).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-1.0, 51.0, 255.0], [0, 51, 255]),
        ([np.nan, np.inf, 1.0], [0, 0, 255]),
        ([-np.inf, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 500_000.0, 1_000_000.0], [0, 128, 255]),
        ([*[0.5] * 27, 1.0, 7.0, 900.0], [*[128] * 27, 255, 255, 255]),  # highlights
    ],
)
def test_which_floats_are_white(values: list[float], expected: list[int]) -> None:
    row = np.array(values, np.float32).reshape(1, -1, 3)
    assert picture(Tiff().write(row)).flatten().tolist() == expected
    column = np.array(values, np.float32).reshape(-1, 1, 1)
    assert picture(Tiff().write(column))[:, 0, 0].tolist() == expected


def test_alpha_has_its_own_range() -> None:
    """Colours up to 255, with an alpha up to 1."""
    shares = colours(4)
    values = (shares * [255, 255, 255, 1]).astype(np.float32)
    assert np.abs(picture(Tiff().write(values)) - on_white(shares)).max() <= 2
    multiplied = (shares * [1, 1, 1, 0] * shares[..., 3:] + shares * [0, 0, 0, 1]).astype(
        np.float32
    )
    found = picture(Tiff(tags={338: (1,)}).write(multiplied))
    assert np.abs(found - on_white(shares)).max() <= 3
    unsaid = picture(Tiff(tags={338: (0,)}).write(values))
    assert np.abs(unsaid - 255 * shares[..., :3]).max() <= 1


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
def test_negative_values_are_black(dtype: str) -> None:
    values = np.array([[[-200, 0, 51], [255, 102, -1]]], dtype)
    found = picture(Tiff(8, predictor=2, planar=True).write(values))
    assert found.tolist() == [[[0, 0, 51], [255, 102, 0]]]


def test_white_is_zero() -> None:
    for dtype in ("float32", "uint32"):
        values = as_type(colours(1), dtype)
        found = picture(Tiff(photometric=0).write(values))
        assert np.abs(found - 255 * (1 - colours(1))).max() <= 1


@pytest.mark.parametrize(("right", "down"), [(1, 1), (2, 2), (2, 1), (4, 4)])
def test_planes_of_ycbcr(right: int, down: int) -> None:
    """Two of them are subsampled."""
    values = np.asarray(photo(64, 48).convert("YCbCr"))
    tags = {256: (64,), 257: (48,), 258: (8,) * 3, 259: (8,), 262: (6,), 277: (3,), 284: (2,)}
    tags[530] = (right, down)
    for tile in (None, (32, 16)):
        whole = Tiff(8, tile=tile, rows=16)
        fewer = Tiff(8, tile=tile and (32 // right, 16 // down), rows=16 // down)
        segments = [
            *whole.segments(values[..., :1]),
            *fewer.segments(values[::down, ::right, 1:2]),
            *fewer.segments(values[::down, ::right, 2:]),
        ]
        found = picture(whole.written(segments, tags)).astype(int)
        assert np.abs(found - np.asarray(photo(64, 48))).max() <= 6 * max(right, down)
        assert failure(whole.written(segments[:-1], tags)) == "corrupt"
        assert failure(whole.written(segments, tags | {530: (60_000, 60_000)})) == "corrupt"


def test_levels_of_ycbcr() -> None:
    """Luma from 16 to 235, and chroma from 16 to 240, as in video."""
    full = np.asarray(photo(64, 48).convert("YCbCr")).astype(float)
    video = full * [219 / 255, 224 / 255, 224 / 255] + [16, 16, 16]
    tags = {530: (1, 1), 532: (16, 235, 128, 240, 128, 240)}
    data = Tiff(8, planar=True, photometric=6, tags=tags).write(video.round().astype(np.uint8))
    assert np.abs(picture(data).astype(int) - np.asarray(photo(64, 48))).max() <= 4


def test_lab_of_16_bits() -> None:
    """L from 0 to 100 as 0 to 65535, a and b in steps of 1/256."""
    red = [round(54.29 / 100 * 65_535), round(80.81 * 256), round(69.89 * 256)]
    values = np.array([[red, [65_535, 0, 0]]], np.uint16)
    found = picture(Tiff(5, predictor=2, photometric=8).write(values)).astype(int)
    assert np.abs(found - [[[255, 0, 0], [255, 255, 255]]]).max() <= 10  # steps of 8 bits of Lab


@pytest.mark.parametrize("compression", [34712, 50001, 50002])
@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_strips_that_are_image_files(
    compression: int, tile: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compression == 50002:
        pytest.importorskip("pillow_jxl", reason="pip install -e '.[dev]'")
    values, way = (colours(3) * 255).astype(np.uint8), Tiff(compression, tile=tile)
    data = way.write(values)
    assert (picture(data) == values).all()
    if compression != 50001:  # WebP has neither greys nor 16 bits
        assert (picture(replace(way, planar=True).write(values)) == values).all()
        deep = picture(way.write(as_type(colours(1), "uint16")))
        assert np.abs(deep - 255 * colours(1)).max() <= 1
    for share in (0.3, 0.6):
        assert failure(way.write(values, share)) == "corrupt"
    assert failure(replace(way, tags={256: (70,), 322: (32,)}).write(values)) == "corrupt"
    if compression == 50002:
        monkeypatch.setitem(sys.modules, "pillow_jxl", None)  # as where it is not installed
        with pytest.raises(DecodeError, match=r"pip install 'vlv-ray\[jxl\]'") as raised:
            ImageFile(data)
        assert raised.value.kind == "unsupported"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = photo().transpose(undo[orientation]) if orientation > 1 else photo()
    floats = np.asarray(turned, np.float32) / 255
    opened = ImageFile(Tiff(tags={274: (orientation,)}).write(floats), 10**6)
    assert (opened.width, opened.height) == photo().size
    assert (opened.picture() == np.asarray(photo())).all()


def test_a_profile_is_applied() -> None:
    """Photoshop's floats are linear, by their profile."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = profile.index(b"para")  # of all channels
    profile[curve : curve + 12] = b"curv" + bytes(8)
    linear = np.full((4, 4, 3), 55 / 255, np.float32)
    data = Tiff(tags={34675: bytes(profile)}).write(linear)
    seen = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(picture(data) - seen).max() <= 1


# --------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("tile", [None, (16, 32)])
@pytest.mark.parametrize("compression", PACKINGS)
def test_a_truncated_strip_or_tile_is_corrupt(
    compression: int, tile: tuple[int, int] | None, planar: bool
) -> None:
    noise = np.random.default_rng(1).random((37, 53, 3)).astype(np.float32)
    way = Tiff(compression, planar=planar, tile=tile)
    whole = way.write(noise)
    picture(whole)
    for share in (0, 0.5, 0.9):
        assert failure(way.write(noise, share)) == "corrupt"
    assert failure(whole[:9_000] + whole[9_100:]) == "corrupt"  # behind which all offsets are wrong


def test_a_changed_byte_is_found_by_the_checksum() -> None:
    whole = Tiff(8, rows=37).write(colours(3).astype(np.float32))
    for place in range(20, 3_000, 100):
        data = bytearray(whole)
        data[place] ^= 4
        assert failure(bytes(data)) == "corrupt"


def test_a_tiff_that_takes_too_much_memory_fails_by_its_directory() -> None:
    values = colours(3).astype(np.float64)
    pixels = values.shape[0] * values.shape[1]
    assert failure(Tiff().write(values), pixels - 1) == "too_large"
    picture(Tiff().write(values.astype(np.float32)), pixels)
    assert failure(Tiff().write(values), pixels) == "too_large"  # 24 bytes each
    for tags in (
        {256: (60_000,), 257: (60_000,)},
        {322: (1 << 20,), 323: (1 << 20,)},
        {322: (1 << 31,), 323: (16,)},
        {257: (200_000,), 256: (2,), 278: (1,)},
    ):
        tile = (16, 32) if 322 in tags else None
        assert failure(Tiff(8, tile=tile, tags=tags).write(values), 10**6) == "too_large"


def test_the_compressed_stream_of_a_strip_may_be_endless() -> None:
    """Of 16 MB little more than the picture's bytes is decompressed."""
    way, values = Tiff(8, rows=37), colours(3).astype(np.float32)
    (strip,) = way.segments(values)
    tags = {256: (53,), 257: (37,), 258: (32,) * 3, 259: (8,), 262: (2,), 277: (3,), 339: (3,) * 3}
    assert (picture(way.written([strip], tags)) == picture(way.write(values))).all()
    endless = PACKINGS[8](bytes(1 << 24), 1)
    assert picture(way.written([endless], tags)).max() == 0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_tiffs_give_a_picture_or_a_failure_class(data: st.DataObject) -> None:
    way = Tiff(
        data.draw(st.sampled_from([*PACKINGS, 50001])), data.draw(st.integers(1, 3)),
        tile=data.draw(st.sampled_from([None, (16, 16)])), big=data.draw(st.booleans()),
    )  # fmt: skip
    dtype = "uint8" if way.compression == 50001 else data.draw(st.sampled_from(FLOATS))
    whole = bytearray(way.write(as_type(colours(3)[:20, :20], dtype)))
    for _ in range(data.draw(st.integers(1, 8))):
        behind = data.draw(st.booleans())  # where the directory lies
        place = data.draw(st.integers(0, min(len(whole) - 1, 400)))
        whole[-1 - place if behind else place] = data.draw(st.integers(0, 255))
    try:
        found = str(picture(bytes(whole)).dtype)
    except DecodeError as error:
        found = error.kind
    assert found in ("uint8", *FAILURE_CLASSES)


# ------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize("name", sorted(ODD_TIFFS))
def test_real_files(name: str, shared_dir: Path) -> None:
    """Files that Pillow does not open."""
    with (
        pytest.raises(Exception, match=r"cannot identify|unknown raw mode"),
        Image.open(shared_dir / "nasty/broken_tiff" / name) as image,
    ):
        image.load()
    found = picture((shared_dir / "nasty/broken_tiff" / name).read_bytes())
    assert found.std() > 10
