"""How a job says what went wrong: in one line, however deep the cause lies."""

import errno
import sys
from pathlib import Path

import pytest

from pipelines.entry import BAD_INPUT, main
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


@pytest.mark.parametrize("wrap", [lambda e: e, wrapped, of_a_rank])
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
