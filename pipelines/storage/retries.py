"""Requests to an object store, which are tried again while it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pipelines.storage.protocols import is_url
from vlv_model.errors import RunError, VLVError, one_line

T = TypeVar("T")

PAUSES = (1.0, 2.0, 5.0, 15.0, 30.0)
"""Seconds between the attempts."""
ANSWERS = (
    FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError,
    VLVError, ValueError, TypeError, AttributeError, LookupError,
)  # fmt: skip
"""What a store answers, and our own faults: no reason to try again."""


def with_retries(action: Callable[[], T], path: Path, pauses: Sequence[float] | None = None) -> T:
    """Run an action on a path; on a remote one again after a pause while its store fails.

    A store's answer (no such file, no permission) is raised as it is. Raises RunError, one line, where
    the store still fails after the `pauses` (seconds; PAUSES by default, about a minute in all).
    """
    if not is_url(path):
        return action()
    for pause in (*(PAUSES if pauses is None else pauses), None):
        try:
            return action()
        except ANSWERS:
            raise
        except Exception as problem:  # clients raise errors of their own, without a common base
            if pause is None:
                raise unavailable(path, problem) from problem
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def unavailable(path: Path, problem: Exception) -> RunError:
    """The error for a store that does not answer."""
    return RunError(
        f"{path}: the store does not answer ({one_line(problem)}): when it does, the same command goes on "
        "where this one stopped"
    )
