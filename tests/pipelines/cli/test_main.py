"""How a job says what went wrong: in one line, however deep the cause lies."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli.main import BAD_INPUT, main
from vlv_model.config import Config
from vlv_model.errors import DataError


class Nothing(Config):
    """A job without settings."""


def ended(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def run(_: Nothing) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["jobs/some.py"])
    return main(Nothing, run, "A job.")


def wrapped(cause: BaseException) -> RuntimeError:
    """As a step's error comes back from a worker."""
    outer = RuntimeError("a step failed")
    outer.cause = cause  # type: ignore[attr-defined]
    return outer


@pytest.mark.parametrize("wrap", [lambda e: e, wrapped])
def test_a_full_disk_is_one_line(wrap, monkeypatch, capsys) -> None:
    arrows = OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left")
    assert ended(wrap(arrows), monkeypatch) == BAD_INPUT
    assert capsys.readouterr().err == "error: No space left on device: writing\n"


def test_rays_advice_is_no_name_of_a_file(monkeypatch, capsys) -> None:
    advice = "Failed to apply UDF transform after 1/1 attempts.\nTo change retry attempts, …"
    assert ended(wrapped(OSError(errno.ENOSPC, "full", advice)), monkeypatch) == BAD_INPUT
    assert capsys.readouterr().err == "error: No space left on device: writing\n"


def test_the_file_is_named_where_it_is_known(monkeypatch, capsys) -> None:
    error = wrapped(OSError(errno.EACCES, "Permission denied", str(Path("/data/x"))))
    assert ended(error, monkeypatch) == BAD_INPUT
    assert capsys.readouterr().err == "error: Permission denied: /data/x\n"


def test_a_line_of_ours_wins_over_what_it_was_made_of(monkeypatch, capsys) -> None:
    error = DataError("data.input=/x cannot be read: mend it")
    error.__cause__ = OSError(errno.EACCES, "Permission denied", "/x")
    assert ended(error, monkeypatch) == BAD_INPUT
    assert capsys.readouterr().err == "error: data.input=/x cannot be read: mend it\n"


def of_a_rank(cause: Exception) -> Exception:
    """As Ray Train hands on what became of a rank that it no longer reaches."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("ranks failed", {0: WorkerHealthCheckFailedError("gone", cause)})


def of_the_controller(cause: Exception) -> Exception:
    """As when Ray ends what leads the ranks: it takes several processes at a time."""
    from ray.train import ControllerError

    return ControllerError(cause)


@pytest.mark.parametrize("wrap", [lambda e: e, wrapped, of_a_rank, of_the_controller])
def test_a_machine_without_memory_is_one_line(wrap, monkeypatch, capsys) -> None:
    from ray.exceptions import OutOfMemoryError

    said = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
        "192.0.2.2, ID: 84939d3617d3) was 9.52GB used / 9.59GB limit (0.993)\nOOM kill reason: …"
    )
    assert ended(wrap(OutOfMemoryError(said)), monkeypatch) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: the memory of a machine is full (192.0.2.2: 9.52GB used / 9.59GB)"
    )
    assert line.endswith("the same command then continues")


def test_a_fault_while_a_refusal_was_handled_keeps_its_traceback(monkeypatch) -> None:
    refused = OSError(errno.EACCES, "Permission denied", "/x")
    fault = TypeError("of the program")
    fault.__context__ = refused
    with pytest.raises(TypeError, match="of the program"):
        ended(fault, monkeypatch)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch) -> None:
    with pytest.raises(OSError, match="odd"):
        ended(OSError(errno.EIO, "odd"), monkeypatch)


SLEEPER = """
import signal, sys, time
from pipelines.cli.main import main
from vlv_model.config import Config

class Nothing(Config): pass

def run(_):
    try:
        print("at work", flush=True)
        time.sleep(0.5 if "ignored" in sys.argv[0] else 1000)
    finally:
        print("unwound", flush=True)

if "ignored" in sys.argv[0]:  # as nohup does
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
def test_a_signal_ends_a_job_in_good_order(
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
    assert job.stdout.readline() == "at work\n"
    job.send_signal(number)
    out, said = job.communicate(timeout=60)
    line = "interrupted: the same command continues where this one stopped\n"
    assert (job.returncode, out, said) == (status, "unwound\n", line if status else "")


@pytest.mark.parametrize("code", [3, 0, "bye", None])
def test_other_exits_are_left_alone(code: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as left:
        ended(SystemExit(code), monkeypatch)
    assert left.value.code == code


def test_rays_own_exit_while_it_starts_is_the_signals(monkeypatch, capsys) -> None:
    assert ended(SystemExit(signal.SIGTERM), monkeypatch) == 143
    assert capsys.readouterr().err.startswith("interrupted: ")
