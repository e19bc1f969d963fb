"""A job reports an error in one line, however deep the cause lies."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli.main import BAD_INPUT, OUTPUT_CLOSED, main
from vlv_model.config import Config
from vlv_model.errors import DataError


class Nothing(Config):
    """A job without settings."""


def exit_status(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def run(_: Nothing) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["jobs/some.py"])
    return main(Nothing, run, "A job.")


def wrapped(cause: BaseException) -> RuntimeError:
    """Like an error of a step that comes back from a worker."""
    outer = RuntimeError("a step failed")
    outer.cause = cause  # type: ignore[attr-defined]
    return outer


@pytest.mark.parametrize("wrap", [lambda e: e, wrapped])
def test_full_disk_is_a_one_line_error(wrap, monkeypatch, capsys) -> None:
    arrow_error = OSError(
        errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left"
    )
    assert exit_status(wrap(arrow_error), monkeypatch) == BAD_INPUT
    assert capsys.readouterr().err == "error: No space left on device: writing\n"


def test_advice_of_ray_is_not_taken_for_a_file_name(monkeypatch, capsys) -> None:
    advice = "Failed to apply UDF transform after 1/1 attempts.\nTo change retry attempts, …"
    assert exit_status(wrapped(OSError(errno.ENOSPC, "full", advice)), monkeypatch) == BAD_INPUT
    assert capsys.readouterr().err == "error: No space left on device: writing\n"


def test_error_names_the_file_if_known(monkeypatch, capsys) -> None:
    error = wrapped(OSError(errno.EACCES, "Permission denied", str(Path("/data/x"))))
    assert exit_status(error, monkeypatch) == BAD_INPUT
    assert capsys.readouterr().err == "error: Permission denied: /data/x\n"


def test_vlv_error_takes_precedence_over_its_cause(monkeypatch, capsys) -> None:
    error = DataError("data.input=/x cannot be read: repair it")
    error.__cause__ = OSError(errno.EACCES, "Permission denied", "/x")
    assert exit_status(error, monkeypatch) == BAD_INPUT
    assert capsys.readouterr().err == "error: data.input=/x cannot be read: repair it\n"


def rank_error(cause: Exception) -> Exception:
    """Ray Train's error for a rank that it can no longer reach."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("ranks failed", {0: WorkerHealthCheckFailedError("gone", cause)})


def controller_error(cause: Exception) -> Exception:
    """Ray Train's error when its controller is killed too: Ray kills several processes at a time."""
    from ray.train import ControllerError

    return ControllerError(cause)


@pytest.mark.parametrize("wrap", [lambda e: e, wrapped, rank_error, controller_error])
def test_full_memory_is_a_one_line_error(wrap, monkeypatch, capsys) -> None:
    from ray.exceptions import OutOfMemoryError

    message = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
        "192.0.2.2, ID: 84939d3617d3) was 9.52GB used / 9.59GB limit (0.993)\nOOM kill reason: …"
    )
    assert exit_status(wrap(OutOfMemoryError(message)), monkeypatch) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: the memory of a machine is full (192.0.2.2: 9.52GB used / 9.59GB)"
    )
    assert line.endswith("the same command then continues")


def test_bug_while_a_system_error_is_handled_keeps_its_traceback(monkeypatch) -> None:
    system_error = OSError(errno.EACCES, "Permission denied", "/x")
    bug = TypeError("a bug")
    bug.__context__ = system_error
    with pytest.raises(TypeError, match="a bug"):
        exit_status(bug, monkeypatch)


def test_bug_keeps_its_traceback(monkeypatch) -> None:
    with pytest.raises(OSError, match="odd"):
        exit_status(OSError(errno.EIO, "odd"), monkeypatch)


SLEEPER = """
import signal, sys, time
from pipelines.cli.main import main
from vlv_model.config import Config

class Nothing(Config): pass

def run(_):
    try:
        print("started", flush=True)
        time.sleep(0.5 if "ignored" in sys.argv[0] else 1000)
    finally:
        print("cleaned up", flush=True)

if "ignored" in sys.argv[0]:  # like nohup
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.exit(main(Nothing, run, "A job."))
"""


@pytest.mark.parametrize(
    ("name", "number", "status"),
    [
        ("job", signal.SIGINT, 130),
        ("job", signal.SIGTERM, 143),
        ("job", signal.SIGHUP, 129),
        ("ignored", signal.SIGHUP, 0),
    ],
)
def test_signal_ends_a_job_after_its_cleanup(
    name: str, number: signal.Signals, status: int, tmp_path: Path
) -> None:
    (tmp_path / f"{name}.py").write_text(SLEEPER)
    job = subprocess.Popen(
        [sys.executable, str(tmp_path / f"{name}.py")],
        env={"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "started\n"
    job.send_signal(number)
    out, errors = job.communicate(timeout=60)
    line = "interrupted: the same command continues where this one stopped\n"
    assert (job.returncode, out, errors) == (status, "cleaned up\n", line if status else "")


@pytest.mark.parametrize("code", [3, 0, "bye", None])
def test_other_exits_are_unchanged(code: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as exit:
        exit_status(SystemExit(code), monkeypatch)
    assert exit.value.code == code


def test_exit_of_ray_during_its_start_has_the_status_of_the_signal(monkeypatch, capsys) -> None:
    assert exit_status(SystemExit(signal.SIGTERM), monkeypatch) == 143
    assert capsys.readouterr().err.startswith("interrupted: ")


@pytest.mark.parametrize(
    ("continues", "line"),
    [
        (True, "interrupted: the same command continues where this one stopped\n"),
        (False, "interrupted\n"),
    ],
)
def test_an_interruption_promises_no_more_than_the_job_keeps(
    continues: bool,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_: Nothing) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["jobs/some.py"])
    assert main(Nothing, run, "A job.", continues=continues) == 130
    assert capsys.readouterr().err == line


WRITER = """
import sys
from pipelines.cli.main import main
from vlv_model.config import Config
def run(config):
    for _ in range(100_000):
        print("a caption")
sys.exit(main(Config, run, "A job."))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_job_ends_quietly_when_nobody_reads_its_output(unbuffered: str) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", WRITER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert job.stdout is not None
    assert job.stderr is not None
    job.stdout.readline()
    job.stdout.close()
    assert (job.stderr.read(), job.wait()) == (b"", OUTPUT_CLOSED)


def test_a_full_disk_under_the_standard_output_is_a_one_line_error() -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", WRITER], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (ended.stderr, ended.returncode) == (
        "error: No space left on device: writing\n",
        BAD_INPUT,
    )
