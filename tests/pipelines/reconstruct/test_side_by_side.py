"""Side-by-side image files are written once and removed with their rows."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.cli.config import build
from pipelines.images.plans import read_plan
from pipelines.images.removal import SIDE_BY_SIDE as FOLDER
from pipelines.images.removal import remove_files
from pipelines.images.rows import OK, RECONSTRUCTION_ROW, key_of
from pipelines.images.selection import Selection
from pipelines.pictures.squares import square_of
from pipelines.reconstruct.side_by_side import write_files
from pipelines.storage.tables import Table
from tests.pipelines.image_jobs import open_table
from vlv_model.squares import Square

SQUARE = Square(16)
GREY = np.full((16, 16, 3), 99, np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three files, one of which is not an image."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (2, 20, 16, 3), np.uint8)
    for number, pixels in enumerate(noise):
        (folder / f"{number}.png").write_bytes(png(pixels))
    (folder / "broken.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def table(photographs: Path, tmp_path: Path) -> Table:
    """A finished table with grey reconstructions."""
    given = {"input": str(photographs), "output": str(tmp_path / "made"), "rows_per_chunk": 2}
    table = open_table("reconstruction", build(Selection, given), {})
    for chunk in table.pending():
        keys = read_plan(table.folder, chunk)["key"].to_pylist()
        images = [image_of(photographs, key) for key in keys]
        rows = {
            "key": keys,
            "image": [{"bytes": png(GREY), "path": None} if image else None for image in images],
            "status": [OK if image else "decode:corrupt" for image in images],
            "error": [None if image else "it is none" for image in images],
        }
        table.write(chunk, pa.table(rows, schema=RECONSTRUCTION_ROW))
    return table


def names(folder: Path) -> dict[int, Path]:
    return {key_of(file.name): file for file in folder.iterdir()}


def image_of(folder: Path, key: int) -> bytes | None:
    file = names(folder)[key]
    return None if "broken" in file.name else file.read_bytes()


def test_each_file_has_the_square_left_and_the_picture_right(
    table: Table, photographs: Path
) -> None:
    write_files(table, SQUARE)
    files = {int(file.stem): file for file in (table.folder / FOLDER).iterdir()}
    assert len(files) == 2
    for key, file in files.items():
        content = image_of(photographs, key)
        assert content is not None
        pixels = np.asarray(Image.open(file))
        assert pixels.shape == (16, 32, 3)
        assert np.array_equal(pixels[:, :16], square_of(content, SQUARE).transpose(1, 2, 0))
        assert np.array_equal(pixels[:, 16:], GREY)


def test_existing_files_are_not_rewritten_and_arrow_reads_the_table(table: Table) -> None:
    write_files(table, SQUARE)
    first, second = sorted((table.folder / FOLDER).iterdir())
    first.unlink()
    written = second.stat().st_mtime_ns
    write_files(table, SQUARE)
    assert first.exists()
    assert second.stat().st_mtime_ns == written
    assert pq.read_table(table.parts).num_rows == 3


def test_a_missing_original_skips_only_its_file(
    table: Table, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photographs / "0.png").unlink()
    write_files(table, SQUARE)
    (file,) = (table.folder / FOLDER).iterdir()
    assert int(file.stem) == key_of("1.png")
    assert f"no {FOLDER}/{key_of('0.png')}.png: " in capsys.readouterr().err


def test_a_takedown_deletes_the_files(table: Table) -> None:
    remove_files(table, {1, 2})  # of a table without files, nothing
    write_files(table, SQUARE)
    first, second = sorted((table.folder / FOLDER).iterdir())
    remove_files(table, {int(first.stem), 77})
    assert list((table.folder / FOLDER).iterdir()) == [second]
