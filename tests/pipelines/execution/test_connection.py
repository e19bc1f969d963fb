"""Ray comes and goes: an address where nobody is, or a head that is killed, costs seconds and one line."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.execution.connection import RAY_LOST, RayConfig, _dropping, ray_session
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
        "from pipelines.execution.connection import RayConfig, ray_session\n"
        "from vlv_model.errors import RunError\n"
        "try:\n"
        "    ray_session(RayConfig(num_cpus=1)).__enter__()\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )
    environment = {key: v for key, v in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[3]), "RAY_TMPDIR": str(too_long)}
    command = [sys.executable, "-c", job]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    (line,) = said.stdout.splitlines()
    assert line.startswith("Ray did not start on this machine ("), said.stderr
    assert "ray.address" in line


JOB = """
import contextlib, sys, time
import psutil, ray
from pipelines.execution.connection import RayConfig, ray_session

@ray.remote
def work(seconds):
    time.sleep(seconds)

def victims():
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith(sys.argv[1]):
                yield process

if __name__ == "__main__":
    with ray_session(RayConfig(num_cpus=1, object_store_gb=0.1)):
        try:
            ray.get(ray.remote(lambda: None).remote())
            task = work.remote(float(sys.argv[2]))  # the first call asks the GCS, which a signal must not meet
            print("at work", flush=True)
            while not (found := list(victims())) and sys.argv[1] != "nothing":
                time.sleep(0.1)  # an agent takes its name late
            for process in found:
                process.kill()
            while True:
                ray.get(task)
                task = work.remote(float(sys.argv[2]))
        finally:
            time.sleep(3)  # Ray's core, whose raylet is gone, sends a second signal meanwhile
            print("unwound", flush=True)
"""


def start_job(folder: Path, killed: str, seconds: float) -> subprocess.Popen[str]:
    """A job that kills processes of its own Ray, and waits for tasks of so many seconds."""
    (folder / "job.py").write_text(JOB)
    environment = {key: v for key, v in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    command = [sys.executable, str(folder / "job.py"), killed, str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("killed", "name", "seconds"),
    [
        ("gcs_server", "gcs_server", 1000),
        pytest.param("ray::DashboardAgent", "raylet", 0.1, marks=pytest.mark.faults),
        pytest.param("raylet", "raylet", 1000, marks=pytest.mark.faults),
        pytest.param("raylet", "raylet", 0.1, marks=pytest.mark.faults),
        pytest.param("gcs_server", "gcs_server", 0.1, marks=pytest.mark.faults),
        pytest.param("ray::DashboardAgent", "raylet", 1000, marks=pytest.mark.faults),
    ],
)
def test_a_job_whose_ray_is_killed_ends_with_a_line(
    killed: str, name: str, seconds: float, tmp_path: Path
) -> None:
    """Left to itself, Ray waits for its return, and ends with lines of C++ or a traceback. A raylet
    ends by itself, in good order, when an agent of its is gone."""
    job = start_job(tmp_path, killed, seconds)
    _, said = job.communicate(timeout=300)
    assert job.returncode == RAY_LOST, said
    last = said.splitlines()[-1]
    assert last.startswith(f"error: Ray's {name} on this machine is gone")
    assert "the same command continues" in last


@pytest.mark.end_to_end
@pytest.mark.faults
def test_a_job_that_is_told_to_end_with_its_ray_does_so_in_good_order(tmp_path: Path) -> None:
    """By a status of its own and without a traceback; and unwound, unless Ray, whose processes got the
    signal too, is faster: its core ends the process, or an error of its is cut short.
    """
    for _ in range(3):
        job = start_job(tmp_path, "nothing", 1000)
        assert job.stdout is not None
        assert job.stdout.readline() == "at work\n"
        os.killpg(job.pid, signal.SIGTERM)
        out, said = job.communicate(timeout=300)
        assert job.returncode in (128 + signal.SIGTERM, 1), said
        assert "Traceback" not in said
        assert "error: Ray's" not in said
        if "unwound\n" in out:
            return
    pytest.fail(f"was not unwound in three attempts: {said}")


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.faults)]
)
def test_a_job_that_waits_for_a_task_is_unwound_by_a_signal(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Ray's core, which the job waits in, makes an end of its own, or an abort, of a SystemExit."""
    job = start_job(tmp_path, "nothing", 1000)
    assert job.stdout is not None
    assert job.stdout.readline() == "at work\n"
    job.send_signal(number)
    out, said = job.communicate(timeout=300)
    assert job.returncode == 128 + number, said
    assert "unwound\n" in out
    assert "Traceback" not in said


def test_the_line_of_rays_log_level_is_dropped_and_others_are_kept(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with _dropping(b"RAY_BACKEND_LOG_LEVEL"):
        os.write(2, b"an error\n[I] Set ray log level from RAY_BACKEND_LOG_LEVEL to 3\nlast")
    assert capfd.readouterr().err == "an error\nlast"
