"""Images that end the process that works on them: bounded, and no other row is lost."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.cli.main import causes_of
from pipelines.execution import image_job as image_job_module
from pipelines.execution.connection import PoolSize, RayConfig
from pipelines.execution.image_job import ActorConfig
from pipelines.execution.quarantine import MOST_ALONE, MOST_WHOLE, Attempts, GuardedStep
from pipelines.execution.table_job import run_table_job
from pipelines.images.rows import OK, status
from pipelines.images.selection import Selection
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import Table, parquet_files
from tests.pipelines.image_jobs import image_job
from vlv_model.errors import ModelError, RunError

WHITE, BLACK = 255, 0
TIMES = ["busy", "present"]


class Mean:
    """A step without a model: says how bright a square is, and dies of squares that are `deadly`."""

    failed = status("mean", "failed")

    def __init__(self, deadly: int, log: str) -> None:
        self.deadly, self.log = deadly, log

    def __call__(self, block: pa.Table) -> pa.Table:
        means = []
        for pixels, state in zip(
            block["pixels"].to_pylist(), block["status"].to_pylist(), strict=True
        ):
            mean = float(np.frombuffer(pixels, np.uint8).mean()) if state == OK else None
            if mean == self.deadly:
                with open(self.log, "a") as file:
                    file.write(f"{block.num_rows}\n")
                os._exit(1)
            means.append(mean)
        return block.select(["chunk", "key", "name", "status", "error"]).append_column(
            "mean", pa.array(means, pa.float64())
        )


class ReadOrDie(image_job_module.ReadImages):
    """Its decoder crashes on white pictures, without a word."""

    def _read(self, reader, position):
        read = super()._read(reader, position)
        if read.pixels and set(read.pixels) == {WHITE}:
            os._exit(1)
        return read


@pytest.fixture
def by_value() -> Iterator[None]:
    """Workers get the classes of this file, which they cannot import."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        colour = WHITE if number in (3, 4) else 10 + number
        Image.new("RGB", (32, 32), (colour,) * 3).save(folder / f"{number:02d}.png")
    (folder / "12.png").write_bytes(b"none")
    return folder


def means(
    pictures: Path, output: Path, deadly: int, num_actors: PoolSize = 1, rows_per_chunk: int = 8
) -> Table:
    data = Selection(input=str(pictures), output=str(output), rows_per_chunk=rows_per_chunk)
    actors = ActorConfig(num_actors=num_actors, use_gpu=False)
    log = str(output.parent / "deaths")
    job = image_job("mean", data, {}, Mean, (deadly, log), actors)
    run_table_job(job, data.output, RayConfig())
    return Table(data.output)


@pytest.mark.end_to_end
def test_images_that_kill_are_rows_and_cost_no_other(ray_local, by_value, pictures, tmp_path):
    table = means(pictures, tmp_path / "means", WHITE)
    rows = {r["name"]: r for r in read_rows(parquet_files(str(table.folder)),
                                            ["name", "status", "error", "mean"])}  # fmt: skip
    assert len(rows) == 13
    assert table.counts() == {"ok": 10, "decode:not_an_image": 1, "mean:failed": 2}
    for number in range(12):
        row = rows[f"{number:02d}.png"]
        if number in (3, 4):
            assert row["status"] == "mean:failed"
            assert row["error"] == "the process died 3 times while it worked on this image"
        else:
            assert row["mean"] == 10 + number
    # As a whole twice in each chunk that has one, then alone: three times for each of them.
    deaths = [int(line) for line in (tmp_path / "deaths").read_text().split()]
    assert deaths.count(1) == 2 * MOST_ALONE
    assert len(deaths) - deaths.count(1) in (MOST_WHOLE, 2 * MOST_WHOLE)
    assert not (table.folder / "_deaths").exists()


@pytest.mark.end_to_end
@pytest.mark.faults
def test_a_decoder_that_crashes_costs_its_image(
    ray_local, by_value, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(image_job_module, "ReadImages", ReadOrDie)
    table = means(pictures, tmp_path / "means", -1)
    assert table.counts() == {"ok": 10, "decode:not_an_image": 1, "decode:crashed": 2}


@pytest.mark.end_to_end
@pytest.mark.faults
def test_a_model_that_dies_of_everything_ends_the_job(ray_local, by_value, tmp_path):
    folder = tmp_path / "black"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    with pytest.raises(RunError, match="died 5 times, with a blank image, too"):
        means(folder, tmp_path / "means", BLACK)


class Slow(Mean):
    """Notes its process."""

    def __call__(self, block: pa.Table) -> pa.Table:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")
        # So long that another one has come, on whatever machine.
        deadline = time.monotonic() + 120
        while len(set(Path(self.log).read_text().split())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.1)
        return super().__call__(block)


@pytest.mark.end_to_end
@pytest.mark.faults
def test_a_pool_grows_to_its_most_while_work_waits(
    ray_local, by_value, pictures, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(sys.modules[__name__], "Mean", Slow)
    table = means(pictures, tmp_path / "means", -1, num_actors=(1, 2), rows_per_chunk=1)
    assert table.counts() == {"ok": 12, "decode:not_an_image": 1}
    assert len(set((tmp_path / "deaths").read_text().split())) == 2
    assert re.search(r"actors busy \d+%", capfd.readouterr().err)


class Refusing(Mean):
    def __init__(self, deadly: int, log: str) -> None:
        raise ModelError("the model is not there")


@pytest.mark.end_to_end
def test_a_step_that_refuses_its_model_says_so(
    ray_local, by_value, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys.modules[__name__], "Mean", Refusing)
    with pytest.raises(Exception, match="the model is not there") as raised:
        # One chunk: a reading task that is cancelled while it imports torch spoils its worker.
        means(pictures, tmp_path / "means", -1, rows_per_chunk=16)
    assert any(isinstance(cause, ModelError) for cause in causes_of(raised.value))


def test_a_death_of_another_cause_is_forgotten(tmp_path: Path) -> None:
    """A machine that goes while a row is worked on says nothing of the row."""
    file = tmp_path / "0.json"
    for _ in range(MOST_WHOLE):
        assert not Attempts(file).row_by_row
    deaths = Attempts(file)
    assert deaths.row_by_row
    with deaths.suspecting(5):
        assert json.loads(file.read_text())["alone"] == {"5": 1}
    with deaths.suspecting(6):  # and the process is killed
        again = Attempts(file)
    assert again.alone == {6: 1}
    assert again.order(8)[0] == 6
    with again.suspecting(6):
        pass
    assert not again.is_quarantined(6)
    with pytest.raises(OSError, match="disk"), again.suspecting(7):
        raise OSError("the disk is gone")  # says nothing of the row either
    assert Attempts(file).alone == {7: 0}
    again.end()
    assert Attempts(file).begun == 1


def test_a_chunk_without_deaths_goes_through_as_a_whole(tmp_path: Path) -> None:
    block = pa.table(
        {
            "chunk": [4, 4],
            "key": [1, 2],
            "name": ["a", "b"],
            "pixels": [bytes([7] * 12), None],
            "status": [OK, "decode:corrupt"],
            "error": pa.array([None, "why"], pa.string()),
        }
    )
    step = GuardedStep(Mean, (WHITE, ""), tmp_path)
    whole = step(block)
    for _ in range(MOST_WHOLE):
        Attempts(tmp_path / "_deaths/000004.json")
    again = step(block)
    assert again.drop_columns(TIMES) == whole.drop_columns(TIMES)
    # Between the two it waited; what it took is shared out among the rows.
    busy, present = (sum(again[name].to_pylist()) for name in TIMES)
    assert 0 < busy < present
    assert whole["mean"].to_pylist() == [7.0, None]
