"""Every file gives a complete picture or a failure class, in bounded memory."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipelines.pictures.decode import (
    FAILURE_CLASSES,
    DecodeError,
    ImageFile,
)
from pipelines.pictures.encode import ImageConfig, phash
from pipelines.pictures.formats import READABLE
from tests.pipelines.pictures.files import LOSSLESS, encoded, photo, photograph, pixels, png, store
from tests.pipelines.pictures.nasty import FILLED_IN, OPENED


def failure(data: bytes, max_pixels: int = 64_000_000) -> str:
    with pytest.raises(DecodeError) as raised:
        ImageFile(data, max_pixels).store(LOSSLESS)
    assert raised.value.kind in FAILURE_CLASSES
    return raised.value.kind


# ---------------------------------------------------------------------------------------- colour


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "GIF", "AVIF"])
def test_formats_are_decoded(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    found = pixels(encoded(photo(), kind, **options)).astype(int)
    tolerance = {"GIF": 40, "AVIF": 12}.get(kind, 1)
    assert np.abs(found - np.asarray(photo())).max() <= tolerance


def test_alpha_is_composited_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    half.putpixel((1, 0), (0, 0, 0, 0))
    found = pixels(encoded(half))
    assert found[0, 0].tolist() == [255, 127, 127]
    assert found[0, 1].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, transparency=0))[0].tolist() == [[255] * 3, [10, 20, 30]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert pixels(encoded(grey))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 256, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[-1.0, 51.0, 255.0]], np.float32), [0, 51, 255]),
        (np.array([[0, 500_000, 1_000_000]], np.int32), [0, 128, 255]),
        (np.array([[np.nan, np.inf, 1.0]], np.float32), [0, 0, 255]),
    ],
)
def test_deep_pixels_become_8_bit(values: np.ndarray, expected: list[int]) -> None:
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == expected


def test_grey_with_other_ranges_than_16_bits() -> None:
    pgm = b"P5 2 1 65535\n" + struct.pack(">2H", 200, 300)  # near to black, not near to white
    assert pixels(pgm)[0, :, 0].tolist() == [0, 1]
    assert pixels(_grey_tiff(12, 1, bytes([0xFF, 0xF8, 0x00])))[0, :, 0].tolist() == [255, 128]
    white_is_zero = struct.pack("<2H", 0, 0xFF00)
    assert pixels(_grey_tiff(16, 0, white_is_zero))[0, :, 0].tolist() == [255, 0]


def test_a_signed_tiff_does_not_wrap() -> None:
    """Negative values are black."""
    for bits, kind in ((8, np.int8), (16, np.int16)):
        values = np.array([-100, 100], kind)
        found = pixels(_grey_tiff(bits, 1, values.tobytes(), {339: 2}))[0, :, 0]
        assert found.tolist() == [0, 100]


@pytest.mark.parametrize("full", [255, 65_535])
def test_a_colour_map_of_8_bits_is_not_black(full: int) -> None:
    """The specification has 16 bits; some writers use 8."""
    colours = np.array([[10, 255, 0], [200, 128, 64]])
    colour_map = (colours.T * (full // 255)).astype("<u2").tobytes()
    tiff = _grey_tiff(1, 3, bytes([0b01000000]) + colour_map, {320: 0})
    entry = struct.pack("<HHI", 320, 4, 1)
    assert entry in tiff
    where = len(tiff) - len(colour_map)
    tiff = tiff.replace(entry + bytes(4), struct.pack("<HHII", 320, 3, 6, where))
    assert pixels(tiff)[0].tolist() == colours.tolist()


@pytest.mark.parametrize(("right", "down"), [(0, 0), (-10, 4)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_clean_aperture_of_an_avif_is_applied(right: int, down: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = encoded(photo(120, 80), "AVIF", exif=exif, quality=100)
    found = ImageFile(with_aperture(whole, 60, 40, right, down))
    left, top = 30 + right, 20 + down
    expected = np.asarray(photo(120, 80))[top : top + 40, left : left + 60].astype(int)
    if orientation == 6:
        expected = np.rot90(expected, -1)
    assert (found.height, found.width) == expected.shape[:2]
    assert np.abs(found.picture() - expected).max() <= 12
    beyond = ImageFile(with_aperture(whole, 60, 40, 500, 0))
    assert sorted((beyond.width, beyond.height)) == [80, 120]


def with_aperture(data: bytes, width: int, height: int, right: int, down: int) -> bytes:
    """An AVIF of Pillow's with a clean aperture, whose centre is offset from the picture's."""
    clap = struct.pack(">I4s4I4i", 40, b"clap", width, 1, height, 1, right, 1, down, 1)
    made = bytearray(data)

    def grow(kind: bytes, by: int) -> int:
        place = made.index(kind) - 4
        (size,) = struct.unpack_from(">I", made, place)
        struct.pack_into(">I", made, place, size + by)
        return place + size

    end = grow(b"ipco", len(clap))
    count, place = 0, made.index(b"ipco") + 4
    while place < end:
        count, place = count + 1, place + int.from_bytes(made[place : place + 4], "big")
    made[end:end] = clap
    entry = made.index(b"ipma") + 4 + 4 + 4  # behind version, flags and the number of items
    assert made[entry : entry + 2] == b"\0\1"
    many = made[entry + 2]
    made[entry + 2] = many + 1
    made[entry + 3 + many : entry + 3 + many] = bytes([count + 1 | 0x80])
    grow(b"ipma", 1)
    for kind in (b"iprp", b"meta"):
        grow(kind, len(clap) + 1)
    place = made.index(b"iloc") + 4 + 4 + 2  # behind version, flags and the widths of its fields
    (items,) = struct.unpack_from(">H", made, place)
    for item in range(items):
        offset = place + 2 + item * 14 + 6
        (value,) = struct.unpack_from(">I", made, offset)
        struct.pack_into(">I", made, offset, value + len(clap) + 1)
    return bytes(made)


def test_premultiplied_alpha_is_undone() -> None:
    """Also of grey, which Pillow cannot convert otherwise."""
    data = bytes([64, 128, 255, 255])  # a grey of 128 at half, white
    tiff = _grey_tiff(8, 1, data, {277: 2, 338: 1}, samples=2)
    assert np.abs(pixels(tiff)[0, :, 0].astype(int) - [191, 255]).max() <= 1
    assert ImageFile(tiff).raw().shape == (1, 2, 3)


def _grey_tiff(
    bits: int,
    photometric: int,
    data: bytes,
    more: dict[int, int] | None = None,
    samples: int = 1,
) -> bytes:
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: samples, 278: 1, 279: len(data)}  # fmt: skip
    tags = dict(sorted((tags | (more or {})).items()))
    tags[273] = 14 + 12 * len(tags)
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + data


def test_16_bit_transparency_and_1_bit() -> None:
    deep = Image.fromarray(np.array([[5000, 6000]], np.uint16))
    assert pixels(encoded(deep, transparency=5000))[0, :, 0].tolist() == [255, 6000 >> 8]
    assert pixels(encoded(Image.new("1", (3, 2), 1))).min() == 255
    assert pixels(encoded(Image.new("L", (3, 2), 77))).tolist() == [[[77] * 3] * 3] * 2


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = pixels(encoded(image, "JPEG", quality=100))[8, 8]
    assert red[0] > 200
    assert red[1:].max() < 60


def test_icc_profiles_are_converted_and_broken_ones_ignored() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = np.asarray(photo())
    for profile in (srgb, lab, b"broken"):  # right; of another colour space; unreadable
        assert (pixels(encoded(photo(), icc_profile=profile)) == plain).all()


def test_a_linear_srgb_profile_is_not_srgb() -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = profile.index(b"para")  # of all channels; its name stays "sRGB built-in"
    profile[curve : curve + 12] = b"curv" + bytes(8)
    grey = Image.new("RGB", (4, 4), (55, 55, 55))
    seen = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(pixels(encoded(grey, icc_profile=bytes(profile))) - seen).max() <= 1


def display_p3() -> bytes:
    """The profile of sRGB with the primaries of Display P3."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {  # as XYZ under D50
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    }
    for name, values in primaries.items():
        # The table of tags has a name, an offset and a size; at the offset are 8 bytes of type.
        offset, size = struct.unpack_from(">II", profile, profile.index(name, 128) + 4)
        assert size == 20
        struct.pack_into(">3i", profile, offset + 8, *(round(v * 65536) for v in values))
    return bytes(profile)


def red_to_blue() -> Image.Image:
    """A gradient whose red leaves room above it."""
    share = np.tile(np.linspace(0, 1, 120), (20, 1))
    parts = [200 * (1 - share), np.zeros_like(share), 200 * share]
    return Image.fromarray(np.stack(parts, -1).astype(np.uint8))


@pytest.mark.parametrize("source", ["made", "shared"])
def test_icc_profiles_change_colours(source: str, request: pytest.FixtureRequest) -> None:
    """Display P3 has a larger gamut, so its values differ from those in sRGB."""
    if source == "made":
        data = encoded(red_to_blue(), icc_profile=display_p3())
    else:
        folder = request.getfixturevalue("shared_dir") / "nasty/icc_profile"
        (file,) = folder.glob("wuffs__red-blue-gradient.dcip3*")
        data = file.read_bytes()
    numbers = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    found = pixels(data).astype(int)
    assert np.abs(found - numbers).mean() > 3
    assert found[..., 0].max() >= numbers[..., 0].max()  # red of P3 is beyond sRGB's


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = photo()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = upright.transpose(undo[orientation]) if orientation > 1 else upright
    data = encoded(turned, kind, exif=exif)
    assert (pixels(data) == np.asarray(upright)).all()
    opened = ImageFile(data, 10**6)
    assert (opened.width, opened.height) == upright.size


def test_first_frames_are_decoded() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "TIFF", "WEBP"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
        assert pixels(data)[0, 0].tolist() == [255, 0, 0]


# --------------------------------------------------------------------------------------- failures


def test_bombs_fail_by_their_header() -> None:
    assert failure(png((60_000, 60_000, 8, 2), b"")) == "too_large"
    assert failure(png((9_000, 9_000, 8, 2), b"")) == "too_large"
    assert failure(encoded(photo(120, 80)), max_pixels=9_599) == "too_large"
    assert store(encoded(photo(120, 80)), ImageConfig(max_pixels=9_600)).width == 80


def test_a_jpeg_with_too_many_scans_fails() -> None:
    progressive = encoded(photo(800, 600).convert("L"), "JPEG", progressive=True)[:-2]
    empty_scan = b"\xff\xda\0\x08\x01\x01\0\x01\x3f\x10\0"
    assert store(progressive + empty_scan * 20 + b"\xff\xd9").width == 800
    assert failure(progressive + empty_scan * 200 + b"\xff\xd9") == "too_large"
    # What is no scan does not count: other data in a segment, and behind the end.
    comment = b"\xff\xfe\x10\0" + b"\xff\xda" * 2047
    assert store(progressive[:2] + comment + progressive[2:] + b"\xff\xd9" + comment).width == 800


def test_the_images_in_an_icon_have_their_own_size() -> None:
    inner = encoded(Image.new("RGBA", (300, 300), "red"))
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    icon = b"\0\0\1\0\1\0" + entry + inner
    assert pixels(icon).shape == (300, 300, 3)
    assert ImageFile(icon, 10**6).width == 300
    assert failure(icon, max_pixels=80_000) == "too_large"


def test_a_picture_beyond_the_formats_limit_is_too_large() -> None:
    wide = encoded(Image.new("RGB", (20_000, 1)))
    with pytest.raises(DecodeError, match="20000x1 does not fit into webp") as raised:
        store(wide, ImageConfig(resize="no", format="webp"))
    assert raised.value.kind == "too_large"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_truncated_files_are_corrupt(kind: str) -> None:
    data = encoded(photo(), kind)
    assert failure(data[: len(data) // 2]) == "corrupt"


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "HEIF", "JPEG", "PNG", "JPEG2000"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_download_that_ends_in_zeros_is_corrupt(kind: str, share: float) -> None:
    """Zeros replace the missing bytes; the decoders of WebP and AVIF accept them."""
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded(photograph(600, 400), kind)
    cut = int(len(data) * share)
    assert failure(data[:cut] + bytes(len(data) - cut)) == "corrupt"
    store(data)


@pytest.mark.parametrize("tail", [b"\0\0\0\1mdat", b"\0\0\0\1mdat\0\0\0", b"\0\0\0\3mdat"])
def test_a_truncated_box_size_is_no_traceback(tail: bytes) -> None:
    head = encoded(photo(), "AVIF")
    assert failure(head[: head.index(b"meta") - 4] + tail) == "corrupt"


def test_zeros_between_parts_of_a_file_are_harmless() -> None:
    exif = Image.Exif()
    exif[0x010E] = "\0" * 3000
    for kind in ("WEBP", "AVIF"):
        store(encoded(photograph(600, 400), kind, exif=exif) + bytes(5000))


@pytest.mark.parametrize(("kind", "module"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
@pytest.mark.parametrize("orientation", [1, 6])
def test_formats_of_extras(
    kind: str, module: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = pytest.importorskip(module, reason="pip install -e '.[dev]'")
    if kind == "HEIF":
        opener.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(), kind, quality=95, exif=exif.tobytes())
    expected = np.asarray(photo()).astype(int)
    expected = np.rot90(expected, -1) if orientation == 6 else expected
    found = ImageFile(data)
    assert (found.height, found.width) == expected.shape[:2]
    assert np.abs(found.picture() - expected).max() <= 16
    clear = photo().convert("RGBA")
    clear.putalpha(0)
    assert ImageFile(encoded(clear, kind)).picture().min() >= 250
    assert failure(data[: len(data) // 2]) == "corrupt"
    assert failure(data, max_pixels=9_599) == "too_large"

    monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    with pytest.raises(DecodeError, match=rf"pip install 'vlv-ray\[{kind.lower()}\]'") as raised:
        ImageFile(data)
    assert raised.value.kind == "unsupported"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_half_a_jpeg_with_an_end_is_corrupt(mode: str) -> None:
    """Decoders fill missing pixels with grey, and only warn."""
    whole = encoded(photo(300, 200).convert(mode), "JPEG", restart_marker_rows=1)
    assert failure(whole[: len(whole) // 2] + b"\xff\xd9") == "corrupt"
    lost = whole[: whole.index(b"\xff\xd3")] + whole[whole.index(b"\xff\xd5") :]
    assert failure(lost) == "corrupt"
    store(whole + b"what lies behind the end is no part of it")


def test_error_messages_are_deterministic() -> None:
    for data in (png((4, 1, 7, 2), b""), b"\xff\xd8\xff\xe0", b"II*\0" + bytes(9)):
        with pytest.raises(
            DecodeError, match=r"its header is damaged, or of a kind of [A-Z]+ that"
        ):
            ImageFile(data, 10**6)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "not_an_image"),
        (b"<html><body>gone</body></html>", "not_an_image"),
        (bytes(1000), "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),  # no Ghostscript
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"),
        (
            b"<?xml?>\n<!-- %s -->\n<!DOCTYPE svg [<!ENTITY a 'b'>]>\n<svg>" % (b"a" * 900),
            "unsupported",
        ),
        (b"<!doctype html><html><svg/></html>", "not_an_image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported"),
        (b"8BPS\0\1" + bytes(100), "unsupported"),
        (b"\xff\xd8\xff\xe0", "corrupt"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "corrupt"),
    ],
)
def test_failure_classes(data: bytes, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # an extra
    assert failure(data) == kind


@settings(deadline=None)
@given(st.data())
def test_damaged_files_give_a_picture_or_a_failure_class(data: Any) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
    whole = bytearray(encoded(photo(24, 16), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    try:
        found = str(pixels(bytes(whole), ImageConfig(size=16)).dtype)
    except DecodeError as error:
        found = error.kind
    assert found in ("uint8", *FAILURE_CLASSES)


# ------------------------------------------------------------------------------------------- hash


def test_phash_depends_on_the_picture_not_the_file() -> None:
    rng = np.random.default_rng(1)
    coarse = [Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)) for _ in range(2)]
    first, second = (image.resize((200, 160), Image.Resampling.BICUBIC) for image in coarse)

    def bits(image: Image.Image) -> int:
        return int(phash(np.asarray(image)), 16)

    smaller = Image.open(io.BytesIO(encoded(first.resize((100, 80)), "JPEG", quality=60)))
    assert len(phash(np.asarray(first))) == 16
    assert (bits(first) ^ bits(smaller)).bit_count() <= 6
    assert (bits(first) ^ bits(second)).bit_count() >= 16
    assert phash(np.full((9, 9, 3), 255, np.uint8)) == phash(np.zeros((5, 5, 3), np.uint8))


# ------------------------------------------------------------------------------------------ nasty

_IN_A_CHILD = """
import io, json, resource, sys, warnings
sys.modules |= {"pillow_heif": None, "pillow_jxl": None}  # extras
from pathlib import Path
import numpy as np
from PIL import Image, ImageCms
from pipelines.pictures.decode import DecodeError, ImageFile
from pipelines.pictures.encode import ImageConfig

def found(data):
    try:
        stored = ImageFile(data, 64_000_000).store(ImageConfig())
    except DecodeError as error:
        return error.kind
    image = Image.open(io.BytesIO(stored.data))
    image.load()
    assert image.mode == "RGB" and image.size == (stored.width, stored.height)
    return "ok"

def loads(data):
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image.format
    except Exception:
        return None

warnings.simplefilter("ignore")
files = {file: Path(file).read_bytes() for file in sys.stdin.read().splitlines()}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
results = {file: found(data) for file, data in files.items()}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
pillow = {file: loads(data) for file, data in files.items()}
print(json.dumps({"results": results, "pillow": pillow, "peak_mb": peak / 1024}))
"""


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))


def test_nasty_files_in_bounded_memory(nasty_files: dict[Path, str | None]) -> None:
    """All files, in a process limited to 3 GB of address space."""
    expected = {str(file): outcome for file, outcome in nasty_files.items()}
    child = subprocess.run(
        [sys.executable, "-c", _IN_A_CHILD],
        input="\n".join(expected),
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=_limit_memory,
        cwd=Path(__file__).parents[3],
    )
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(child.stdout)
    results, pillow = report["results"], report["pillow"]
    assert results.keys() == expected.keys()
    assert report["peak_mb"] < 500
    for file, found in results.items():
        assert found in ("ok", *FAILURE_CLASSES)
        # What Pillow loads whole is stored, unless it is of a format that we do not open; nothing else is.
        if Path(file).name not in OPENED | FILLED_IN:
            assert (found == "ok") == (pillow[file] in {*READABLE, "MPO"}), file
        assert expected[file] in (None, found), file


def test_a_damaged_png_is_not_stored_in_part() -> None:
    """Reading a PNG's EXIF loads it; a failure there must not leave half a picture."""
    data = bytearray(encoded(photo(200, 200)))
    data[len(data) // 2] ^= 0xFF
    assert failure(bytes(data)) == "corrupt"
