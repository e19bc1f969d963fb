"""Images that end the process that works on them: bounded, and no other row is lost."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray.data
from PIL import Image

from pipelines.cli.main import causes_of
from pipelines.execution import image_job as image_job_module
from pipelines.execution.cluster import _mapped
from pipelines.execution.connection import PoolSize, RayConfig
from pipelines.execution.image_job import ActorConfig
from pipelines.execution.quarantine import MOST_ALONE, MOST_WHOLE, Attempts, GuardedStep
from pipelines.execution.steps import Chunk, ChunkByChunk, ModelDiedError, PlacedStep
from pipelines.execution.table_job import run_table_job
from pipelines.images.rows import OK, status
from pipelines.images.selection import Selection
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import Table, parquet_files
from tests.pipelines.image_jobs import image_job
from vlv_model.errors import ModelError, RunError

WHITE, BLACK = 255, 0
HERE = RayConfig(address="in-process")
MOST_HELD = 3


class Mean(ChunkByChunk):
    """A step without a model: says how bright a square is, and dies of squares that are `deadly`."""

    failed = status("mean", "failed")

    def __init__(self, deadly: int, log: str) -> None:
        self.deadly, self.log = deadly, log

    def __call__(self, chunk: Chunk) -> Chunk:
        return self.means([chunk])[0]

    def means(self, chunks: list[Chunk]) -> list[Chunk]:
        """All at once."""
        found = []
        for chunk in chunks:
            means = []
            for row in chunk.rows.select(["pixels", "status"]).to_pylist():
                usable = row["status"] == OK
                mean = float(np.frombuffer(row["pixels"], np.uint8).mean()) if usable else None
                if mean == self.deadly:
                    self.die([chunk.rows.num_rows for chunk in chunks])
                means.append(mean)
            rows = chunk.rows.select(["key", "name", "status", "error"])
            rows = rows.append_column("mean", pa.array(means, pa.float64()))
            found.append(replace(chunk, rows=rows))
        return found

    def die(self, rows: list[int]) -> None:
        """Without a word, or because nothing works any more."""
        with open(self.log, "a+") as file:
            file.seek(0)
            deaths = len(file.readlines())
            file.write(f"{sum(rows)} {len(rows)}\n")
        if deaths % 2:
            raise ModelDiedError("the model is broken")
        os._exit(1)


class Together(Mean):
    """Works on all chunks that have come."""

    def process(self, chunks: Iterator[Chunk | None]) -> Iterator[Chunk]:
        held: list[Chunk] = []
        for chunk in chunks:
            if chunk is not None:
                held.append(chunk)
            if chunk is None or len(held) == MOST_HELD:
                yield from self.means(held)
                held = []
        yield from self.means(held)


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
    pictures: Path,
    output: Path,
    deadly: int,
    num_actors: PoolSize = 1,
    rows_per_chunk: int = 8,
    step: type[Mean] = Mean,
    in_flight: int = 1,
) -> Table:
    data = Selection(input=str(pictures), output=str(output), rows_per_chunk=rows_per_chunk)
    actors = ActorConfig(num_actors=num_actors, use_gpu=False)
    log = str(output.parent / "deaths")
    job = image_job("mean", data, {}, step, (deadly, log), actors, in_flight=in_flight)
    run_table_job(job, data.output, RayConfig())
    return Table(data.output)


@pytest.mark.end_to_end
def test_images_that_kill_are_rows_and_cost_no_other(ray_local, by_value, pictures, tmp_path):
    table = means(pictures, tmp_path / "means", WHITE, 1, 5, Together, MOST_HELD)
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
    # As a whole twice in each chunk that has one, once with others and once alone (unless the first
    # death was the other's); then row by row: three times for each of them.
    deaths = [tuple(map(int, line.split())) for line in (tmp_path / "deaths").open()]
    alone = deaths.count((1, 1))
    assert alone == 2 * MOST_ALONE
    assert MOST_WHOLE <= len(deaths) - alone <= 2 * MOST_WHOLE
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

    def __call__(self, chunk: Chunk) -> Chunk:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")
        # So long that another one has come, on whatever machine.
        deadline = time.monotonic() + 120
        while len(set(Path(self.log).read_text().split())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.1)
        return super().__call__(chunk)


@pytest.mark.end_to_end
@pytest.mark.faults
def test_a_pool_grows_to_its_most_while_work_waits(ray_local, by_value, pictures, tmp_path, capfd):
    table = means(pictures, tmp_path / "means", -1, num_actors=(1, 2), rows_per_chunk=1, step=Slow)
    assert table.counts() == {"ok": 12, "decode:not_an_image": 1}
    assert len(set((tmp_path / "deaths").read_text().split())) == 2
    assert re.search(r"actors busy \d+%", capfd.readouterr().err)


class Refusing(Mean):
    def __init__(self, deadly: int, log: str) -> None:
        raise ModelError("the model is not there")


@pytest.mark.end_to_end
def test_a_step_that_refuses_its_model_says_so(ray_local, by_value, pictures, tmp_path):
    with pytest.raises(Exception, match="the model is not there") as raised:
        # One chunk: a reading task that is cancelled while it imports torch spoils its worker.
        means(pictures, tmp_path / "means", -1, rows_per_chunk=16, step=Refusing)
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


class Killed(Together):
    """Is killed once, with several chunks in work."""

    def means(self, chunks: list[Chunk]) -> list[Chunk]:
        if any(chunk.number == 4 for chunk in chunks) and not Path(self.log).exists():
            Path(self.log).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().means(chunks)


def run_killed(pictures: Path, output: Path) -> None:
    data = Selection(input=str(pictures), output=str(output), rows_per_chunk=2)
    log = str(output.parent / "killed")
    run_table_job(image_job("mean", data, {}, Killed, (-1, log)), data.output, HERE)


def test_a_killed_job_goes_on_with_what_is_not_committed(pictures: Path, tmp_path: Path) -> None:
    job = multiprocessing.get_context("fork").Process(
        target=run_killed, args=(pictures, tmp_path / "means")
    )
    job.start()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    table = Table(tmp_path / "means")
    assert table.pending() == [3, 4, 5, 6]
    suspects = sorted(file.name for file in (table.folder / "_deaths").iterdir())
    assert suspects == ["000003.json", "000004.json", "000005.json"]  # all that was in work
    run_killed(pictures, tmp_path / "means")
    assert table.counts() == {"ok": 12, "decode:not_an_image": 1}
    rows = read_rows(parquet_files(str(table.folder)), ["name", "mean"])
    brightness = {f"{n:02d}.png": WHITE if n in (3, 4) else 10 + n for n in range(12)}
    assert {row["name"]: row["mean"] for row in rows} == {**brightness, "12.png": None}
    assert not (table.folder / "_deaths").exists()


def chunk_of(number: int, *brightness: int | None) -> Chunk:
    """Squares of one brightness each; None for one that could not be decoded."""
    rows = {
        "key": list(range(len(brightness))),
        "name": [str(value) for value in brightness],
        "pixels": pa.array([v if v is None else bytes([v] * 12) for v in brightness], pa.binary()),
        "status": ["decode:corrupt" if value is None else OK for value in brightness],
        "error": pa.array(["why" if value is None else None for value in brightness], pa.string()),
    }
    return Chunk(number, pa.table(rows))


def test_a_chunk_without_deaths_goes_through_as_a_whole(tmp_path: Path) -> None:
    step = GuardedStep(Mean, (WHITE, ""), tmp_path)
    (whole,) = step.process(iter([chunk_of(4, 7, None)]))
    for _ in range(MOST_WHOLE):
        Attempts(tmp_path / "_deaths/000004.json")
    time.sleep(0.01)
    (again,) = step.process(iter([chunk_of(4, 7, None)]))
    assert again.rows == whole.rows
    assert whole.rows["mean"].to_pylist() == [7.0, None]


def test_waiting_for_chunks_is_no_work(tmp_path: Path) -> None:
    def chunks() -> Iterator[Chunk]:
        for number in range(3):
            time.sleep(0.05)
            yield chunk_of(number, 7)
        time.sleep(0.05)

    first, *later = GuardedStep(Mean, (WHITE, ""), tmp_path).process(chunks())
    assert 0 < first.busy == first.present  # before the first one, the model was loaded
    assert all(0 < chunk.busy < chunk.present for chunk in later)
    assert all(chunk.present > 0.05 for chunk in later)


class Mortal(Together):
    """Its deaths can be survived by the test."""

    def die(self, rows: list[int]) -> None:
        with open(self.log, "a") as file:
            file.write(f"{sum(rows)} {len(rows)}\n")
        raise ModelDiedError("the model is broken")


def test_chunks_beside_a_deadly_row_are_suspects_for_one_attempt(tmp_path: Path) -> None:
    """They are not done row by row, which is slow, and no row of them is blamed."""
    log, alone = tmp_path / "log", []

    class Watched(GuardedStep):
        def _row_by_row(self, chunk, attempts):
            alone.append(chunk.number)
            return super()._row_by_row(chunk, attempts)

    rows = {1: (3, 4), 2: (WHITE, 5, None), 3: (6,), 4: (), 5: (7, 8)}
    waiting, done = [chunk_of(number, *values) for number, values in rows.items()], []
    for _ in range(9):  # processes
        step = Watched(Mortal, (WHITE, str(log)), tmp_path)
        try:
            for chunk in step.process(iter(waiting)):
                done.append(chunk)
                waiting = [other for other in waiting if other.number != chunk.number]
        except ModelDiedError:
            continue
        break
    assert sorted(chunk.number for chunk in done) == list(rows)
    found = {chunk.number: chunk.rows for chunk in done}
    assert found[2]["status"].to_pylist() == ["mean:failed", OK, "decode:corrupt"]
    for number in (1, 3, 4, 5):
        assert found[number]["mean"].to_pylist() == list(rows[number])
    assert log.read_text().splitlines() == ["6 3", "3 1", *["1 1"] * MOST_ALONE]
    assert set(alone) == {2}
    # A result that is lost with its process is made again without a death.
    again = Watched(Mortal, (WHITE, str(log)), tmp_path)
    (chunk,) = again.process(iter([chunk_of(2, *rows[2])]))
    assert chunk.rows == found[2]
    assert len(log.read_text().splitlines()) == 2 + MOST_ALONE


def test_a_step_on_gpus_takes_whole_chunks(ray_local, tmp_path):
    """This Ray has no GPU, so the step is only planned: Ray Data refuses some options there."""
    step = PlacedStep(GuardedStep, (object, (), tmp_path), {"num_gpus": 1}, actors=(1, 2))
    assert "_ModelActor" in repr(_mapped(ray.data.range(1), step))
