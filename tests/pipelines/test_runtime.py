"""Ray comes and goes: an address where nobody is, or a head that is killed, costs seconds and one line."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import runtime
from pipelines.runtime import RAY_LOST, RayConfig, ray_session
from tests.conftest import ChunksHere
from vlv_model.errors import RunError


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:9{}"])
def test_an_address_without_a_ray_is_one_line(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever other tests hold
    address = address.format(free_port())
    with pytest.raises(RunError) as refused, ray_session(RayConfig(address=address)):
        raise AssertionError("connected to nothing")
    assert str(refused.value).startswith(f"no Ray answers at {address} (")
    assert "leave ray.address and RAY_ADDRESS out" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_environments_address_is_knocked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(RunError, match="no Ray answers"), ray_session(RayConfig()):
        raise AssertionError("connected to nothing")


def test_a_ray_of_the_jobs_own_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 120)  # for a socket
    job = (
        "from pipelines.runtime import RayConfig, ray_session\n"
        "from vlv_model.errors import RunError\n"
        "try:\n"
        "    ray_session(RayConfig(num_cpus=1)).__enter__()\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )
    environment = {key: v for key, v in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_TMPDIR": str(too_long)}
    command = [sys.executable, "-c", job]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    (line,) = said.stdout.splitlines()
    assert line.startswith("Ray did not start on this machine ("), said.stderr
    assert "ray.address" in line


@pytest.mark.parametrize("seconds", [0.0, 0.05, 100.0])
def test_chunks_are_mapped_here_first_and_each_once(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def waves(chunks: Sequence[int]) -> Iterator[ChunksHere]:
        sent.extend(chunks)
        yield ChunksHere(pa.table({"chunk": [chunk]}) for chunk in chunks)

    monkeypatch.setattr(runtime, "_waves", waves)
    monkeypatch.setattr(runtime, "_HERE", seconds)
    mapped = runtime.map_chunks([7, 3, 5, 4], slow)
    assert [block["chunk"].to_pylist() for block in mapped] == [[7], [3], [5], [4]]
    assert sent == {0.0: [7, 3, 5, 4], 0.05: [3, 5, 4], 100.0: []}[seconds]


def slow(chunks: pa.Table) -> pa.Table:
    time.sleep(0.1)
    return chunks


WAITING = """
import sys
import psutil, ray
from pipelines.runtime import RayConfig, ray_session

@ray.remote
def wait():
    import time
    time.sleep(1000)

if __name__ == "__main__":
    with ray_session(RayConfig(num_cpus=1, object_store_gb=0.1)):
        task = wait.remote()
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith(sys.argv[1]):
                process.kill()
        ray.get(task)
"""


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("killed", "name"),
    [("raylet", "raylet"), ("gcs_server", "gcs_server"), ("ray::DashboardAgent", "raylet")],
)
def test_a_job_whose_ray_is_killed_ends_with_a_line(killed: str, name: str, tmp_path: Path) -> None:
    """Left to itself, Ray waits for its return, and ends with lines of C++ alone. A raylet ends by
    itself, in good order, when an agent of its is gone."""
    (tmp_path / "job.py").write_text(WAITING)
    environment = {key: v for key, v in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "job.py"), killed]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == RAY_LOST, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"error: Ray's {name} on this machine is gone")
    assert "the same command continues" in last
