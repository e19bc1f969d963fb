"""Files on a local disk or at a URL of an object store (`s3://`, `gs://`, `hf://`).

Both are paths with pathlib's methods: universal_pathlib's `UPath` provides them over fsspec. The
functions here hide the differences and retry remote requests. A local file becomes complete by a
rename; in an object store a PUT is complete or absent. Credentials and endpoints come from the
environment variables of the store's own tools (AWS_ENDPOINT_URL, …).
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from upath import UPath

from vlv_model.errors import RunError, VLVError, one_line

T = TypeVar("T")

PROTOCOLS = ("s3", "gs", "hf")
"""URL schemes at which tables and lists may lie; `gs` needs gcsfs."""
PAUSES = (1.0, 2.0, 5.0, 15.0, 30.0)
"""Seconds between attempts."""
FINAL_ERRORS = (
    FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError,
    VLVError, ValueError, TypeError, AttributeError, LookupError,
)  # fmt: skip
"""Errors that are never retried: the store's definite answers, and bugs in this program."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # names that `replace_atomically` gives


def as_path(path: str | Path) -> Path:
    """The path or URL as an object with pathlib's methods."""
    if not is_url(path):
        return Path(path)
    # No cached listings: another process may have written since.
    remote: Any = UPath(str(path), use_listings_cache=False)
    return remote


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL (`s3://…`)."""
    return "://" in str(path)


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


def is_file(path: Path) -> bool:
    """Whether a file exists. False for invalid names, where pathlib raises."""
    return remote_type(path) == "file" if is_url(path) else os.path.isfile(path)


def remote_type(path: Path) -> str | None:
    """fsspec's type of what lies at a URL, `file` or `directory`; None if nothing does.

    fsspec's own `isfile` also returns False when the store fails.
    """
    remote: Any = path
    try:
        kind: str = with_retries(lambda: remote.fs.info(remote.path), path)["type"]
    except FileNotFoundError:
        return None
    return kind


def remove_file(file: Path) -> None:
    """Delete a file if it exists."""
    if is_file(file):
        with_retries(file.unlink, file)


def read_text(file: Path) -> str:
    """The content of a UTF-8 file."""
    return with_retries(lambda: file.read_text(encoding="utf-8"), file)


def read_texts(files: list[Path]) -> list[str]:
    """The contents of many small remote files, requested concurrently."""
    paths: list[Any] = [*files]
    contents = with_retries(lambda: paths[0].fs.cat([path.path for path in paths]), files[0])
    return [contents[path.path].decode() for path in paths]


def read_bytes(file: Path, offset: int = 0, size: int | None = None, most: int = -1) -> bytes:
    """`size` bytes of a file from `offset`; by default the rest, of a local file at most `most`.

    Raises FileNotFoundError if there is no regular file: a pipe would never end.
    """
    if size == 0:  # stores refuse an empty range
        return b""
    if is_url(file):
        remote: Any = file
        end = None if size is None else offset + size
        content: bytes = with_retries(
            lambda: remote.fs.cat_file(remote.path, start=offset, end=end), file
        )
        return content
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file")
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(most if size is None else size)


class DiskFullError(RunError, OSError):
    """A disk or a user's quota is full; the message names the path."""


def raise_if_full(error: OSError, path: str | Path) -> None:
    """Raise DiskFullError if writing to `path` failed because the disk is full; else return."""
    if error.errno in _DISK_FULL:
        raise DiskFullError(
            f"{path} cannot be written: {os.strerror(error.errno)}: free some space, then the same "
            "command continues where this one stopped"
        ) from error


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside a local `path`; rename it to `path` at the end.

    If the block fails, the temporary file is deleted. Raises DiskFullError with the path if the disk
    is full: Arrow's own error does not name it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power failure may leave a short file under the new name
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # it may be what fills the disk
        if isinstance(error, OSError):
            raise_if_full(error, path)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that readers see complete or not at all, even after a power failure."""
    data = content.encode() if isinstance(content, str) else content
    if is_url(path):
        with_retries(lambda: path.write_bytes(data), path)
    else:
        write_pieces(path, [data])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Like `write_atomically`, from pieces that need not fit into memory together."""
    if is_url(path):
        remote: Any = path
        with tempfile.TemporaryDirectory(prefix="vlv-file-") as folder:
            local = Path(folder, "whole")
            write_pieces(local, pieces)
            with_retries(lambda: remote.fs.put_file(str(local), remote.path), path)
        return
    with replace_atomically(path) as temporary, open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)


def remove_temporary_files(folder: Path) -> None:
    """Remove, at any depth, the temporary files that killed writers left in a folder."""
    for parent, _, names in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, names):
            Path(parent, name).unlink(missing_ok=True)
