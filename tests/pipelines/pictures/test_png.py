"""A PNG's chunks: damaged pixels are found, damaged metadata cost no picture."""

from __future__ import annotations

import struct
import zlib

import pytest
from PIL import Image, ImageCms

from pipelines.pictures.decode import DecodeError, ImageFile
from pipelines.pictures.encode import ImageConfig
from pipelines.pictures.png import read_chunks
from tests.pipelines.pictures.files import encoded, photo, photograph, pixels, png, png_chunk, store


@pytest.mark.parametrize("interlaced", [0, 1])
def test_missing_rows_fail(interlaced: int) -> None:
    row = b"\0" + bytes([200, 100, 50]) * 8
    # Of eight lines of eight; as seven passes, 15 lines of 1, 1, 2, 2, 4, 4 and 8 columns.
    whole = b"".join(
        b"\0" + bytes([200, 100, 50]) * columns
        for columns, lines in ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
        for _ in range(lines)
    )
    rows = whole if interlaced else row * 8
    assert (pixels(png((8, 8, 8, 2), rows, interlaced=interlaced)) == [200, 100, 50]).all()
    with pytest.raises(DecodeError, match="end before the picture"):
        pixels(png((8, 8, 8, 2), rows[:-26], interlaced=interlaced))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (9, 7), (640, 480)])
def test_complete_files_have_all_rows(mode: str, size: tuple[int, int]) -> None:
    image = Image.new("I;16", size) if mode == "I;16" else photo(*size).convert(mode)
    read_chunks(encoded(image)).check_rows()


@pytest.mark.parametrize(
    ("header", "row", "hidden", "expected"),
    [
        ((4, 1, 2, 0), bytes([0b00011011]), [1], [0, 255, 170, 255]),
        ((2, 1, 4, 0), bytes([0x5F]), [5], [255, 255]),
        ((2, 1, 4, 0), bytes([0x15]), [17], [17, 85]),  # no grey of 4 bits
        ((8, 1, 1, 0), bytes([0b01010101]), [0], [255] * 8),
        ((2, 1, 8, 0), bytes([7, 8]), [7], [255, 8]),
        ((2, 1, 16, 2), struct.pack(">6H", *[0xFF00, 0x8000, 0x1000], 0, 0, 0), [0xFF00, 0x8000, 0x1000], [255, 0]),
    ],
)  # fmt: skip
def test_the_transparent_colour_is_scaled_to_the_pixels(
    header: tuple[int, int, int, int], row: bytes, hidden: list[int], expected: list[int]
) -> None:
    told = png_chunk(b"tRNS", struct.pack(f">{len(hidden)}H", *hidden))
    assert pixels(png(header, b"\0" + row, told))[0, :, 2].tolist() == expected


WHOLE = encoded(photo(64, 48))
START = 8 + 25  # behind the header
KEPT = ImageConfig(resize="no", format="png")


def damaged(kind: bytes, body: bytes) -> bytes:
    """A chunk with a wrong checksum."""
    return png_chunk(kind, body)[:-4] + b"\0\1\2\3"


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


LONG = zlib.compress(b"a" * 1_200_000)
ODD_CHUNKS = {
    "gAMA, damaged": damaged(b"gAMA", struct.pack(">I", 45_455)),
    "tEXt, damaged": damaged(b"tEXt", b"Comment\0hello"),
    "gAMA, empty": png_chunk(b"gAMA", b""),
    "cHRM, short": png_chunk(b"cHRM", bytes(7)),
    "pHYs, short": png_chunk(b"pHYs", bytes(3)),
    "sRGB, empty": png_chunk(b"sRGB", b""),
    "eXIf, damaged": damaged(b"eXIf", b"MM\0*"),
    "iCCP, damaged": damaged(b"iCCP", b"icc\0\0" + zlib.compress(srgb())),
    "iCCP, not packed": png_chunk(b"iCCP", b"icc\0\0" + b"profile"),
    "iCCP, without an end": png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(srgb())[:-9]),
    "iCCP, long": png_chunk(b"iCCP", b"icc\0\0" + LONG),
    "zTXt, long": png_chunk(b"zTXt", b"Comment\0\0" + LONG),
    "iTXt, long": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + LONG),
    "tEXt, long": png_chunk(b"tEXt", b"Comment\0" + b"a" * 1_200_000),
    "tIME, odd": png_chunk(b"tIME", b"x"),
    "unknown": png_chunk(b"vpAg", b"x"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_CHUNKS)
def test_metadata_cost_no_picture(name: str) -> None:
    data = WHOLE[:START] + ODD_CHUNKS[name] + WHOLE[START:]
    assert (pixels(data) == pixels(WHOLE)).all()
    stored = store(data, KEPT).data
    if name in ("tIME, odd", "unknown", "iCCP, without an end"):
        assert stored == data  # others read it
    else:
        assert stored == WHOLE


def test_a_long_profile_is_read() -> None:
    """Beyond Pillow's limit of a chunk: profiles with tables may have megabytes."""
    linear = bytearray(srgb())
    curve = linear.index(b"para")
    linear[curve : curve + 12] = b"curv" + bytes(8)
    linear += bytes(1_200_000)
    linear[:4] = len(linear).to_bytes(4, "big")
    short = encoded(photo(64, 48), icc_profile=bytes(linear[:-1_200_000]))
    chunk = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(linear)))
    found = pixels(WHOLE[:START] + chunk + WHOLE[START:])
    assert (found == pixels(short)).all()
    assert (found != pixels(WHOLE)).any()


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"tRNS"])
def test_damaged_chunks_that_pixels_need_are_found(kind: bytes) -> None:
    palette = photo(64, 48).convert("P", palette=Image.Palette.ADAPTIVE)
    whole = encoded(palette, transparency=3)
    pixels(whole)
    place = whole.index(kind) + 4
    for bit in (0, 5):
        data = bytearray(whole)
        data[place] ^= 1 << bit
        with pytest.raises(DecodeError) as raised:
            pixels(bytes(data))
        assert raised.value.kind == "corrupt"


def test_a_file_that_ends_in_zeros_fails() -> None:
    whole = encoded(photograph(200, 150))
    for share in (0.5, 0.8, 0.98):
        cut = int(len(whole) * share)
        with pytest.raises(DecodeError):
            pixels(whole[:cut] + bytes(len(whole) - cut))


def test_the_checksum_of_the_pixels_is_verified() -> None:
    rows = b"".join(b"\0" + bytes([200, 100, 50]) * 8 for _ in range(8))
    packed = bytearray(zlib.compress(rows))
    packed[-1] ^= 1
    chunks = [WHOLE[:8], png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))]
    data = b"".join([*chunks, png_chunk(b"IDAT", bytes(packed)), png_chunk(b"IEND", b"")])
    with pytest.raises(DecodeError, match="compressed pixels are damaged"):
        pixels(data)


def test_the_compressed_stream_may_be_endless() -> None:
    """The picture is complete; little of the data behind it is decompressed."""
    rows = b"".join(b"\0" + bytes([200, 100, 50]) * 8 for _ in range(8))
    data = png((8, 8, 8, 2), rows + bytes(50_000_000))
    assert (pixels(data) == [200, 100, 50]).all()


def test_orientation_may_be_in_a_text() -> None:
    """As written by ImageMagick, and as XMP."""
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    if not raw.startswith(b"Exif\0\0"):
        raw = b"Exif\0\0" + raw
    magick = f"\nexif\n{len(raw):8}\n{raw.hex()}\n".encode()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    texts = (
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(magick)),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    )
    for chunk in texts:
        found = ImageFile(WHOLE[:START] + chunk + WHOLE[START:])
        assert (found.width, found.height) == (48, 64)


def test_text_beyond_the_limit_of_other_readers_is_dropped() -> None:
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20)))
    data = WHOLE[:START] + text * 70 + WHOLE[START:]
    assert store(data, KEPT).data == WHOLE


def test_too_many_chunks_fail() -> None:
    data = WHOLE[:START] + png_chunk(b"IDAT", b"") * 110_000 + WHOLE[START:]
    with pytest.raises(DecodeError, match="chunks") as raised:
        pixels(data)
    assert raised.value.kind == "corrupt"
