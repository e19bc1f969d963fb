"""A JPEG's headers: their faults are repaired, missing pixels are found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipelines.pictures.decode import DecodeError, ImageFile
from pipelines.pictures.encode import ImageConfig
from pipelines.pictures.jpeg import read_headers
from tests.pipelines.pictures.files import LOSSLESS, encoded, lossless_jpeg, photo, pixels, store
from tests.pipelines.pictures.guarded import run_guarded


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


WHOLE = encoded(photo(300, 200), "JPEG", quality=90)
_JFIF_END = 2 + 18
AFTER_JFIF = WHOLE[_JFIF_END:]
assert WHOLE[2:4] == b"\xff\xe0"
ADOBE = b"Adobe\0\x64\0\0\0\0"


HEADERS: dict[str, bytes] = {
    "an empty JFIF": segment(0xE0, b""),
    "a name alone": segment(0xE0, b"JFIF"),
    "a short JFIF": segment(0xE0, b"JFIF\0"),
    "JFIF 9": segment(0xE0, b"JFIF\0\x09\1\0\0\1\0\1\0\0"),
    "a byte too many": WHOLE[2:_JFIF_END] + b"\x55",
    "a byte and a zero": WHOLE[2:_JFIF_END] + b"\xff\0\x55",
    "a short Adobe": WHOLE[2:_JFIF_END] + segment(0xEE, b"Adobe"),
    "an Adobe without its transform": WHOLE[2:_JFIF_END] + segment(0xEE, ADOBE),
    "an Adobe of transform 7": WHOLE[2:_JFIF_END] + segment(0xEE, ADOBE + b"\7"),
    "a short profile": WHOLE[2:_JFIF_END] + segment(0xE2, b"ICC_PROFILE\0\1"),
    "a short block of Photoshop's": WHOLE[2:_JFIF_END] + segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    "an empty block of Photoshop's": WHOLE[2:_JFIF_END] + segment(0xED, b""),
    "pictures that are none": WHOLE[2:_JFIF_END] + segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\xff\xff" + bytes(9)),
    "an empty segment of length 0": WHOLE[2:_JFIF_END] + b"\xff\xe1\0\0",
    "an empty comment of length 1": WHOLE[2:_JFIF_END] + b"\xff\xfe\0\1",
    "a number of lines of length 0": WHOLE[2:_JFIF_END] + b"\xff\xdc\0\0",
    "broken EXIF": WHOLE[2:_JFIF_END] + segment(0xE1, b"Exif\0\0MM"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_costs_no_picture(name: str) -> None:
    data = WHOLE[:2] + HEADERS[name] + AFTER_JFIF
    assert (pixels(data) == pixels(WHOLE)).all()
    for config in (ImageConfig(size=40), ImageConfig(size=100, format="png")):
        assert store(data, config).phash == store(WHOLE, config).phash


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_header_hides_no_missing_pixels(name: str, mode: str, progressive: bool) -> None:
    """libjpeg only reports its first warning, which is about the header."""
    whole = encoded(photo(300, 200).convert(mode), "JPEG", quality=90, progressive=progressive)
    body = whole[_JFIF_END:] if whole[3] == 0xE0 else whole[2:]
    for end in (b"", b"\xff\xd9"):
        half = whole[:2] + HEADERS[name] + body[: len(body) // 2] + end
        for config in (LOSSLESS, ImageConfig(size=50)):
            with pytest.raises(DecodeError) as raised:
                store(half, config)
            assert raised.value.kind == "corrupt"


def test_a_file_with_a_repaired_header_is_kept() -> None:
    """Its pixels are not encoded again."""
    kept = ImageConfig(resize="no", format="jpeg")
    assert store(WHOLE, kept).data == WHOLE
    data = WHOLE[:2] + HEADERS["a short Adobe"] + AFTER_JFIF
    assert store(data, kept).data == WHOLE
    assert store(data, ImageConfig(resize="no", reencode="never")).data == data


def test_extra_bytes_are_damage_in_a_scan_and_padding_at_the_end() -> None:
    for padding in (b"\x31", b"\0\0", bytes(40)):
        assert (pixels(WHOLE[:-2] + padding + WHOLE[-2:]) == pixels(WHOLE)).all()
    for lost in (bytes(200), bytes(range(40, 80))):
        with pytest.raises(DecodeError, match="extraneous"):
            pixels(WHOLE[:-2] + lost + WHOLE[-2:])
    rng = np.random.default_rng(3)
    large = encoded(Image.fromarray(rng.integers(0, 255, (400, 400, 3), np.uint8)), "JPEG")
    for start in rng.integers(700, len(large) - 5000, 40):
        with pytest.raises(DecodeError):
            pixels(large[:start] + bytes(4096) + large[start + 4096 :])


def test_a_sequential_scan_always_has_the_full_spectrum() -> None:
    scan = WHOLE.index(b"\xff\xda")
    end = scan + 2 + int.from_bytes(WHOLE[scan + 2 : scan + 4], "big")
    data = WHOLE[: end - 3] + b"\0\0\0" + WHOLE[end:]
    assert (pixels(data) == pixels(WHOLE)).all()
    with pytest.raises(DecodeError):
        pixels(data[: len(data) // 2] + b"\xff\xd9")


def test_a_valid_file_is_not_copied() -> None:
    assert read_headers(WHOLE).sound is WHOLE


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(4, 300))
def test_any_headers_give_a_picture_or_a_failure_class(junk: bytes, place: int) -> None:
    data = WHOLE[:place] + junk + WHOLE[place:]
    try:
        found = str(pixels(data, ImageConfig(size=16)).shape)
    except DecodeError as error:
        found = error.kind
    assert found in ("(16, 16, 3)", "corrupt", "unsupported", "too_large", "crashed")


# -------------------------------------------------------------------------------- kinds of coding

_ALL_SIZES = """
import sys
import numpy as np
from pipelines.pictures.decode import ImageFile
from pipelines.pictures.encode import ImageConfig, resize
from tests.pipelines.pictures.files import lossless_jpeg

for side in [*range(1, 70), 128, 200, 511]:
    grey = np.add.outer(np.arange(side), 2 * np.arange(side)).astype(np.uint8)
    data = lossless_jpeg(grey)
    for size in (1, 7, 16, 64):
        config = ImageConfig(size=size, format="png")
        opened = ImageFile(data)
        stored = opened.store(config)
        assert (opened.picture()[..., 1] == grey).all()
        assert stored.width == min(side, size)
"""


def test_a_lossless_jpeg_is_decoded_at_full_size_within_its_buffer() -> None:
    """At a smaller scale libjpeg-turbo would write beyond the buffer."""
    child = run_guarded(_ALL_SIZES, [])
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.mark.parametrize("marker", [0xE1, 0xFE, 0xDC])
@pytest.mark.parametrize("length", [0, 1])
def test_a_segment_without_a_length_hides_no_frame(marker: int, length: int) -> None:
    grey = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    data = lossless_jpeg(grey)
    headers = read_headers(data[:2] + bytes([0xFF, marker, 0, length]) + data[2:])
    assert (headers.frame, headers.is_scalable) == (0xC3, False)
    assert not read_headers(b"\xff\xd8\xff").is_scalable


def test_an_unreadable_header_costs_no_other_one() -> None:
    """The orientation and the profile stay."""
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(photo(90, 60), "JPEG", exif=exif, icc_profile=profile)
    odd = data[:2] + segment(0xED, b"Photoshop 3.0\x008BIM\3\xed") + data[2:]
    found = ImageFile(odd)
    assert (found.width, found.height) == (60, 90)
    assert found.image.info["icc_profile"] == profile


def test_too_many_segments_fail() -> None:
    for many in (b"\xff\xfe\0\2" * 110_000, b"\xff" * 1_000_000):
        with pytest.raises(DecodeError) as raised:
            ImageFile(WHOLE[:2] + many + b"\xff\xe0")
        assert raised.value.kind == "corrupt"


def test_half_a_lossless_jpeg_is_corrupt() -> None:
    data = lossless_jpeg(np.asarray(photo(64, 64).convert("L")))
    with pytest.raises(DecodeError) as raised:
        ImageFile(data[: len(data) // 2]).store(ImageConfig(size=16))
    assert raised.value.kind == "corrupt"


@pytest.mark.parametrize("frame", [0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xF7])
def test_codings_without_a_decoder_are_unsupported(frame: int) -> None:
    place = WHOLE.index(b"\xff\xc0")
    data = WHOLE[:place] + bytes([0xFF, frame]) + WHOLE[place + 2 :]
    with pytest.raises(DecodeError) as raised:
        ImageFile(data)
    assert raised.value.kind == "unsupported"
