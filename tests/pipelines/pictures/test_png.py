"""What Pillow passes over in a PNG."""

from __future__ import annotations

import struct

import pytest
from PIL import Image

from pipelines.pictures.decode import DecodeError
from pipelines.pictures.png import check_rows
from tests.pipelines.pictures.files import encoded, photo, pixels, png, png_chunk


@pytest.mark.parametrize("interlaced", [0, 1])
def test_rows_that_did_not_come_are_not_black(interlaced: int) -> None:
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
def test_whole_files_have_all_rows(mode: str, size: tuple[int, int]) -> None:
    image = Image.new("I;16", size) if mode == "I;16" else photo(*size).convert(mode)
    check_rows(encoded(image))


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
def test_the_transparent_colour_is_that_of_the_file(
    header: tuple[int, int, int, int], row: bytes, hidden: list[int], expected: list[int]
) -> None:
    told = png_chunk(b"tRNS", struct.pack(f">{len(hidden)}H", *hidden))
    assert pixels(png(header, b"\0" + row, told))[0, :, 2].tolist() == expected
