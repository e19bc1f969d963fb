"""Raw arrays in place of image files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.pictures.arrays import picture_of, png_of
from pipelines.pictures.decode import DecodeError
from pipelines.pictures.formats import Encoding
from pipelines.pictures.squares import Decoding, square_of
from vlv_model.squares import Square

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ARRAYS: list[tuple[Encoding, bytes]] = [
    ("hwc", PICTURE.tobytes()),
    ("chw", PICTURE.transpose(2, 0, 1).tobytes()),
    ("npy", npy(PICTURE)),
    ("npy", npy(np.ascontiguousarray(PICTURE.transpose(2, 0, 1)))),
]


@pytest.mark.parametrize(("encoding", "content"), ARRAYS)
def test_every_array_is_the_picture(encoding: Encoding, content: bytes) -> None:
    assert np.array_equal(picture_of(content, encoding), PICTURE)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_of(content, encoding)))), PICTURE)
    as_file = png_of(content, encoding)
    for square in (Square(16), Square(8), Square(8, "reference"), Square(24)):
        pixels = Decoding(encoding)(content, square)
        assert pixels.flags.writeable
        assert np.array_equal(pixels, square_of(as_file, square))


def test_an_npy_file_may_have_any_size() -> None:
    wide = np.zeros((4, 9, 3), np.uint8)
    assert picture_of(npy(wide), "npy").shape == (4, 9, 3)
    assert Decoding("npy")(npy(wide), Square(8)).shape == (3, 8, 8)


def test_what_is_no_array_says_what_was_expected() -> None:
    jpeg = io.BytesIO()
    Image.fromarray(PICTURE).save(jpeg, "JPEG")
    for encoding, content, kind, message in [
        ("chw", b"\0" * 770, "not_an_image", r"770 bytes .* 768 \(s = 16\), 867 \(s = 17\)"),
        ("hwc", b"", "not_an_image", r"0 bytes are no array of 3·s·s: .* 3 \(s = 1\)"),
        ("chw", jpeg.getvalue() + b"\0" * 1, "not_an_image", "a JPEG file, but data.image_encoding=chw"),
        ("npy", PICTURE.tobytes(), "not_an_image", "no .npy file"),
        ("npy", npy(PICTURE)[:-1], "corrupt", "no .npy file"),
        ("npy", npy(PICTURE.astype(np.float32)), "unsupported", "float32, expected uint8"),
        ("npy", npy(PICTURE[:, :, 0]), "unsupported", "an array of 16 x 16, expected 3 x h x w or"),
        ("npy", npy(PICTURE[:3]), "unsupported", "an array of 3 x 16 x 3"),
        ("npy", npy(np.array([print], object)), "corrupt", "allow_pickle=False"),
    ]:  # fmt: skip
        with pytest.raises(DecodeError, match=message) as error:
            picture_of(content, encoding)  # type: ignore[arg-type]
        assert error.value.kind == kind


def test_an_array_in_place_of_a_file_names_the_setting() -> None:
    with pytest.raises(DecodeError, match=r"may be a raw array of 3·16·16: .*data.image_encoding"):
        square_of(PICTURE.tobytes(), Square(16))
