"""The decoder's child process: a file that crashes or hangs it costs one row, and nothing else."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipelines.ingest.decoder import Decoder, image_columns
from pipelines.lists.filters import FilterConfig
from pipelines.pictures.encode import ImageConfig


def png(colour: str = "red", side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


IMAGE = ImageConfig(size=32)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(IMAGE, FilterConfig(min_short_side=20))
    yield decoder
    decoder.close()


def pid_of(decoder: Decoder) -> int:
    assert decoder._child is not None
    return decoder._child.pid


def test_rows_equal_those_decoded_in_this_process(decoder: Decoder) -> None:
    for data in (png(), png(side=10), png()[:60], b"no image", b""):
        assert decoder(data) == image_columns(data, IMAGE, FilterConfig(min_short_side=20))


def test_a_decoder_that_is_killed_from_outside_costs_no_row(decoder: Decoder) -> None:
    """Such as by the kernel when memory runs out."""
    assert decoder(png())["status"] == "ok"
    first = pid_of(decoder)
    os.kill(first, signal.SIGKILL)
    assert decoder(png())["status"] == "ok"
    assert pid_of(decoder) != first


@pytest.mark.parametrize("deadly", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_file_that_kills_every_decoder_costs_one_row(
    decoder: Decoder, deadly: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = decoder._start, []

    def start_and_die() -> None:
        start()
        started.append(pid_of(decoder))
        os.kill(started[-1], deadly)

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_start", start_and_die)
        died = decoder(png())
    assert died["status"] == "decode:crashed"
    assert deadly.name in died["error"]
    assert len(set(started)) == 2
    assert decoder(png())["status"] == "ok"


def test_a_decoder_that_hangs_costs_one_row(decoder: Decoder) -> None:
    assert decoder(png())["status"] == "ok"
    first = pid_of(decoder)
    decoder.timeout = 0.3
    os.kill(first, signal.SIGSTOP)
    hung = decoder(png())
    assert hung["status"] == "decode:timeout"
    assert "0.3 seconds" in hung["error"]
    assert not Path(f"/proc/{first}").exists()  # nothing is left behind
    decoder.timeout = 20.0
    assert decoder(png())["status"] == "ok"


def test_a_slow_start_does_not_count_for_the_time_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(2)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    decoder = Decoder(IMAGE, FilterConfig(), seconds=1.9)
    assert decoder(png())["status"] == "ok"
    decoder.close()


def test_the_decoder_has_a_memory_limit(decoder: Decoder) -> None:
    decoder(png())
    limits = Path(f"/proc/{pid_of(decoder)}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max address space"))
    assert int(line.split()[3]) == (1 << 30) + 32 * IMAGE.max_pixels


def test_native_decoders_write_nothing_to_stderr(
    decoder: Decoder, capfd: pytest.CaptureFixture[str]
) -> None:
    file = io.BytesIO()
    Image.new("L", (40, 40), 7).save(file, "TIFF", compression="tiff_lzw")
    damaged = bytearray(file.getvalue())
    damaged[11:20] = b"\xff" * 9  # of the pixels: libtiff would print that it does not know them
    assert decoder(bytes(damaged))["status"] == "decode:corrupt"
    assert capfd.readouterr() == ("", "")


def test_a_decoder_ends_with_its_worker(decoder: Decoder) -> None:
    decoder(png())
    child = pid_of(decoder)
    decoder._pipe.close()  # what the end of a process does
    assert decoder._child is not None
    assert decoder._child.wait(10) == 0
    assert not Path(f"/proc/{child}/cmdline").exists()


def test_every_nasty_file_is_a_row(nasty_files: dict[Path, str | None]) -> None:
    decoder = Decoder(ImageConfig(size=64, max_pixels=20_000_000), FilterConfig())
    for file, expected in nasty_files.items():
        row = decoder(file.read_bytes())
        assert expected in (None, row["status"].removeprefix("decode:")), file
        assert row["status"] == "ok" or row["status"].startswith("decode:"), file
        assert row["status"] not in ("decode:crashed", "decode:timeout"), file
        if row["status"] == "ok":
            stored = Image.open(io.BytesIO(row["image"]["bytes"]))
            assert (stored.mode, stored.size) == ("RGB", (row["width"], row["height"])), file
    decoder.close()
