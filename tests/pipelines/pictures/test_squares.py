"""Squares decoded in a child process: the same ones, and a file that crashes or hangs it is one row."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from pipelines.cli.config import build
from pipelines.execution.read_images import ReadImages
from pipelines.execution.steps import Chunk
from pipelines.images.selection import Selection
from pipelines.pictures.decode import DecodeError
from pipelines.pictures.squares import SquareDecoder, isolated_squares, square_of
from pipelines.storage.tables import Table
from tests.pipelines.image_jobs import open_table
from tests.pipelines.pictures.files import encoded, photo
from vlv_model.config import ModelConfig
from vlv_model.squares import Square

# What stands for a fault of native code, in the child alone: the decoder of JPEGs ends the process,
# or never returns, for certain files.
FAULTS = """
import os, simplejpeg, time
decode = simplejpeg.decode_jpeg
def faulty(data, *given, **more):
    if data.endswith(b"crash"):
        os.abort()
    if data.endswith(b"hang"):
        time.sleep(600)
    return decode(data, *given, **more)
simplejpeg.decode_jpeg = faulty
"""


def jpeg(number: int, end: bytes = b"") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (50, 70, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue() + end


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SquareDecoder]:
    home = tmp_path / "faults"
    home.mkdir()
    (home / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(home), prepend=os.pathsep)
    decoder = SquareDecoder(Square(16), timeout=10.0)
    yield decoder
    decoder.close()


def test_a_child_process_gives_the_same_squares() -> None:
    decoder = SquareDecoder(Square(16))
    content = jpeg(0)
    assert np.array_equal(decoder(content, Square(16)), square_of(content, Square(16)))
    for bad in (b"", b"nothing", content[:200]):
        with pytest.raises(DecodeError) as here:
            square_of(bad, Square(16))
        with pytest.raises(DecodeError) as there:
            decoder(bad, Square(16))
        assert (there.value.kind, str(there.value)) == (here.value.kind, str(here.value))
    decoder.close()


def png_of(image: Image.Image, **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **more)
    return file.getvalue()


def test_a_square_is_the_models_input() -> None:
    assert Square.of(ModelConfig(image_size=32)) == Square(32, "default")
    assert Square.of(ModelConfig(image_size=32, preprocess="reference")) == Square(32, "reference")


def test_reference_squares_ignore_exif_colour_profile_and_alpha() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16, 3), np.uint8)
    plain = Image.fromarray(pixels)
    expected = Square(16, "reference").cut(plain)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    clear = np.dstack([pixels, np.zeros((20, 16), np.uint8)])
    for content in (
        png_of(plain),
        png_of(plain, exif=exif),
        png_of(plain, icc_profile=wide),
        png_of(Image.fromarray(clear, "RGBA")),
    ):
        assert np.array_equal(square_of(content, Square(16, "reference")), expected)
    for content in (png_of(plain, exif=exif), png_of(Image.fromarray(clear, "RGBA"))):
        assert not np.array_equal(square_of(content, Square(16)), Square(16).cut(plain))


def test_reference_squares_need_complete_files() -> None:
    decoder = SquareDecoder(Square(16, "reference"))
    whole = jpeg(0)
    assert np.array_equal(
        decoder(whole, Square(16, "reference")),
        Square(16, "reference").cut(Image.open(io.BytesIO(whole))),
    )
    for bad in (whole[:-400], whole[:-400] + b"\xff\xd9", b"%!PS-Adobe"):
        with pytest.raises(DecodeError):
            decoder(bad, Square(16, "reference"))
    decoder.close()


def read(
    folder: Path, output: Path, decode: SquareDecoder | None = None, **more: Any
) -> list[dict[str, Any]]:
    selection = build(Selection, {"input": str(folder), "output": str(output), **more})
    table = open_table("caption", selection, {})
    step = ReadImages(table, Square(16), decode=decode)
    return step(Chunk(0)).rows.to_pylist()


def test_a_file_that_crashes_or_hangs_a_decoder_is_one_row(
    faulty: SquareDecoder, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, end in enumerate((b"", b"crash", b"", b"hang", b"")):
        (folder / f"{number}.jpg").write_bytes(jpeg(number, end))
    rows = {row["name"]: row for row in read(folder, tmp_path / "out", faulty)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "0.jpg": "ok", "1.jpg": "decode:crashed", "2.jpg": "ok", "3.jpg": "decode:timeout",
        "4.jpg": "ok",
    }  # fmt: skip
    assert "SIGABRT" in rows["1.jpg"]["error"]
    assert "10 seconds" in rows["3.jpg"]["error"]
    for number in (0, 2, 4):
        expected = square_of(jpeg(number), Square(16)).tobytes()
        assert rows[f"{number}.jpg"]["pixels"] == expected


def test_an_image_table_needs_no_child_process(pair_table: Path, tmp_path: Path) -> None:
    """Ingest has decoded its images in a child process."""
    ours = Table(tmp_path / "ours")
    ours.create("image", {}, 1)
    isolated_squares.cache_clear()
    strangers = read(pair_table, tmp_path / "strangers", limit=8)
    assert isolated_squares.cache_info().currsize == 1
    isolated_squares(Square(16)).close()
    rows = pa.concat_tables(pq.read_table(file) for file in pair_table.glob("*.parquet"))
    ours.write(0, rows)
    isolated_squares.cache_clear()
    own = read(ours.folder, tmp_path / "own", limit=8)
    assert isolated_squares.cache_info().currsize == 0  # no child was started
    pixels = {row["key"]: row["pixels"] for row in strangers}
    assert {row["key"]: row["pixels"] for row in own} == pixels


def _odd_files() -> dict[str, bytes]:
    """Files that Pillow alone would show turned, dark, or in other colours."""
    plain = photo(90, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    veiled = plain.convert("RGBA")
    veiled.putalpha(90)
    deep = Image.fromarray(np.linspace(0, 65_535, 60 * 90).reshape(60, 90).astype(np.uint16))
    return {
        "turned.jpg": encoded(plain, "JPEG", exif=exif),
        "cmyk.jpg": encoded(plain.convert("CMYK"), "JPEG"),
        "profile.png": encoded(plain, icc_profile=lab),
        "veiled.png": encoded(veiled),
        "palette.gif": encoded(plain.convert("P"), "GIF"),
        "deep.png": encoded(deep),
        "plain.webp": encoded(plain, "WEBP"),
    }


@pytest.mark.parametrize("preprocess", ["default", "reference"])
@pytest.mark.parametrize("name", _odd_files())
def test_a_model_opens_a_file_as_the_jobs_do(
    name: str, preprocess: Literal["default", "reference"], tmp_path: Path
) -> None:
    square, content = Square(32, preprocess), _odd_files()[name]
    (tmp_path / name).write_bytes(content)
    assert np.array_equal(square.open(tmp_path / name), square_of(content, square))
    opened = Image.open(tmp_path / name)
    assert np.array_equal(square.open(opened), square_of(content, square))
