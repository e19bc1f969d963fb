"""Requests to an object store, retried while the store fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pipelines.storage.protocols import is_url
from vlv_model.errors import RunError, VLVError, one_line

T = TypeVar("T")

PAUSES = (1.0, 2.0, 5.0, 15.0, 30.0)
"""Seconds between attempts."""
FINAL_ERRORS = (
    FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError,
    VLVError, ValueError, TypeError, AttributeError, LookupError,
)  # fmt: skip
"""Errors that are never retried: the store's definite answers, and bugs in this program."""


def with_retries(action: Callable[[], T], path: Path, pauses: Sequence[float] | None = None) -> T:
    """Run an action on a path. On a URL, retry it while the store fails.

    `pauses` are the seconds between attempts (PAUSES by default, about a minute in all). Raises
    FINAL_ERRORS unchanged, and RunError when the last attempt fails too.
    """
    if not is_url(path):
        return action()
    for pause in (*(PAUSES if pauses is None else pauses), None):
        try:
            return action()
        except FINAL_ERRORS:
            raise
        except Exception as error:  # store clients have no common base class of errors
            if pause is None:
                raise store_unavailable(path, error) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def store_unavailable(path: Path, error: Exception) -> RunError:
    """The RunError for a store that keeps failing."""
    return RunError(
        f"{path}: the store does not answer ({one_line(error)}): once it does, the same command "
        "continues where this one stopped"
    )
