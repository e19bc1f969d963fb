"""Files on a local disk, or at a URL of an object store (`s3://`, `gs://`, `hf://`).

Both are paths with pathlib's methods: `UPath` of universal_pathlib has them over fsspec. The functions
here hide what differs, retries included. A local file becomes whole by renaming it; in an object store a
PUT is whole or is not there. Credentials and endpoints come from the environment, as the store's own
tools read them (AWS_ENDPOINT_URL, …).
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upath import UPath

from pipelines.storage.protocols import is_url
from pipelines.storage.retries import with_retries
from vlv_model.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # what `whole_file` names


def as_path(path: str | Path) -> Path:
    """The path or URL as an object with pathlib's methods."""
    if not is_url(path):
        return Path(path)
    # Listings are never cached: another process may have written since.
    found: Any = UPath(str(path), use_listings_cache=False)
    return found


def is_file(path: Path) -> bool:
    """False too for names that no file can have, where Path raises."""
    return kind_of(path) == "file" if is_url(path) else os.path.isfile(path)


def kind_of(path: Path) -> str | None:
    """What lies at a URL. fsspec's `isfile` says no, too, where the store does not answer."""
    remote: Any = path
    try:
        kind: str = with_retries(lambda: remote.fs.info(remote.path), path)["type"]
    except FileNotFoundError:
        return None
    return kind


def remove_file(file: Path) -> None:
    """Delete a file, if it is there."""
    if is_file(file):
        with_retries(file.unlink, file)


def read_text(file: Path) -> str:
    """The content of a file as UTF-8."""
    return with_retries(lambda: file.read_text(encoding="utf-8"), file)


def read_texts(files: list[Path]) -> list[str]:
    """The content of many small remote files, asked for at the same time."""
    paths: list[Any] = [*files]
    found = with_retries(lambda: paths[0].fs.cat([path.path for path in paths]), files[0])
    return [found[path.path].decode() for path in paths]


def read_bytes(file: Path, offset: int = 0, size: int | None = None, most: int = -1) -> bytes:
    """`size` bytes of a file from `offset` on; by default all, of a local file at most `most`.

    Raises FileNotFoundError for what is no file: a pipe would have no end.
    """
    if size == 0:  # stores refuse to send a range of nothing
        return b""
    if is_url(file):
        remote: Any = file
        end = None if size is None else offset + size
        found: bytes = with_retries(
            lambda: remote.fs.cat_file(remote.path, start=offset, end=end), file
        )
        return found
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file")
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(most if size is None else size)


class FullDisk(RunError, OSError):
    """A disk, or a user's share of it, is full; the message names the path."""


def refuse_full(error: OSError, path: str | Path) -> None:
    """Raise FullDisk for an error of writing to `path` that says so; return for any other."""
    if error.errno in _FULL:
        raise FullDisk(
            f"{path} cannot be written: {os.strerror(error.errno)}: make room there, then the same "
            "command continues where this one stopped"
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside a local path, which takes its place at the end, or goes where that fails.

    Raises FullDisk, which names the path, where the disk is full: Arrow's error does not.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # of a full disk it would hold the rest
        if isinstance(error, OSError):
            refuse_full(error, path)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is seen whole or not at all, also after a power cut."""
    data = content.encode() if isinstance(content, str) else content
    if is_url(path):
        with_retries(lambda: path.write_bytes(data), path)
    else:
        write_pieces(path, [data])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file from pieces that memory need not hold together, whole or not at all."""
    if is_url(path):
        remote: Any = path
        with tempfile.TemporaryDirectory(prefix="vlv-file-") as folder:
            local = Path(folder, "whole")
            write_pieces(local, pieces)
            with_retries(lambda: remote.fs.put_file(str(local), remote.path), path)
        return
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def remove_halves(folder: Path) -> None:
    """Remove the files that killed writers left between writing and renaming, in all of a folder."""
    for inside, _, names in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, names):
            Path(inside, name).unlink(missing_ok=True)
