"""No file makes a decoder write beyond a block of memory, or read uninitialised memory."""

from __future__ import annotations

import json
import signal
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.pipelines.pictures import test_avif, test_jpeg
from tests.pipelines.pictures.files import lossless_jpeg
from tests.pipelines.pictures.guarded import run_guarded
from tests.pipelines.pictures.tiffs import CODECS, PACKINGS, Tiff, as_type, colours

# Each line of what it reads is a file, or a fault of its own.
_DECODE = """
import ctypes, hashlib, json, sys
from pathlib import Path
import numpy as np
from pipelines.pictures.decode import DecodeError, ImageFile
from pipelines.pictures.encode import ImageConfig
from pipelines.pictures.squares import square_of
from vlv_model.squares import Square

def stored(data, **how):
    return ImageFile(data, 64_000_000, **how).store(ImageConfig(size=64)).data

WAYS = {
    "ingest": stored,
    "ingest, by the lenient decoder": lambda data: stored(data, quick_jpeg=False),
    "whole": lambda data: ImageFile(data, 4_000_000).picture(),
    "caption": lambda data: square_of(data, Square(64)),
    "caption, as the reference does": lambda data: square_of(data, Square(64, "reference")),
}

def found(way, data):
    try:
        return hashlib.sha256(way(data)).hexdigest()
    except DecodeError as error:
        return error.kind

results = {}
for line in sys.stdin.read().splitlines():
    print(line, file=sys.stderr, flush=True)
    if line == "unwritten":
        results[line] = hashlib.sha256(np.empty(5000, np.uint8)).hexdigest()
    elif line == "overrun":
        block = np.empty(5000, np.uint8)
        ctypes.memset(block.ctypes.data, 0, 5001)
        del block
    else:
        data = Path(line).read_bytes()
        results[line] = {name: found(way, data) for name, way in WAYS.items()}
print(json.dumps(results))
"""


def test_unusual_files_stay_within_their_blocks(tmp_path: Path) -> None:
    """The last one is a deliberate overrun by one byte, which must be found."""
    child = run_guarded(_DECODE, [*written(tmp_path), "overrun"])
    *_, last, death = child.stderr.splitlines()
    assert (child.returncode, last) == (-signal.SIGABRT, "overrun"), child.stderr[-2000:]
    assert "free()" in death


@pytest.mark.faults
def test_all_files_stay_within_their_blocks(
    nasty_files: dict[Path, str | None], tmp_path: Path
) -> None:
    """Twice, with other uninitialised bytes: no picture differs."""
    files = [*map(str, nasty_files), *written(tmp_path / "odd")]
    if (failing := Path(__file__).parents[4] / "shared/failing/images").is_dir():
        files += [str(file) for file in failing.iterdir()]
    results = []
    for filling in (0x55, 0xAA):
        child = run_guarded(_DECODE, [*files, "unwritten"], filling)
        assert child.returncode == 0, child.stderr[-2000:]
        results.append(json.loads(child.stdout))
    first, second = results
    assert first.keys() == {*files, "unwritten"}
    assert [name for name in first if first[name] != second[name]] == ["unwritten"]


def written(folder: Path) -> list[str]:
    """Files of the other tests, in a folder."""
    folder.mkdir(exist_ok=True)
    for name, content in _odd_files().items():
        (folder / name).write_bytes(content)
    return [str(file) for file in sorted(folder.iterdir())]


def _odd_files() -> dict[str, bytes]:
    whole, behind = test_jpeg.WHOLE[:2], test_jpeg.AFTER_JFIF
    found = {f"{name}.jpg": whole + of + behind for name, of in test_jpeg.HEADERS.items()}
    for side in (1, 7, 64, 65):
        grey = np.add.outer(np.arange(side), 2 * np.arange(side)).astype(np.uint8)
        found[f"lossless of {side}.jpg"] = lossless_jpeg(grey)
    found |= {f"{name}.avif": odd() for name, (_, odd) in test_avif.SOUND.items()}
    floats, planes = as_type(colours(3), "float32"), as_type(colours(3), "uint16")
    for number, (packing, share) in enumerate(product(PACKINGS, (0.5, 1))):
        tile = (16, 32) if number % 4 else None
        found[f"{packing} {share}.tiff"] = Tiff(packing, tile=tile).write(floats, share)
        found[f"{packing} {share} planar.tiff"] = Tiff(packing, planar=True).write(planes, share)
    for codec in CODECS.keys() - {50002}:  # which an extra opens
        found[f"{codec}.tiff"] = Tiff(codec).write(as_type(colours(3), "uint8"))
    return found
