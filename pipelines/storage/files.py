"""Files where they lie: a local path, or a URL of an object store (`s3://`, `gs://`, `hf://`).

Both are pathlib's paths: `UPath` of universal_pathlib has the same methods over fsspec. What
differs is here. On a local disk a file is made whole by renaming it; in an object store a PUT is
whole or is not there. Credentials and endpoints come from the environment, as the store's own
tools read them (AWS_ENDPOINT_URL, …).
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
import io
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate
from upath import UPath

from pipelines.storage.protocols import is_url
from vlv_model.errors import DataError, RunError, VLVError, one_line

T = TypeVar("T")

# A store that fails for a while is asked again after these seconds.
_PATIENCE = (1.0, 2.0, 5.0, 15.0, 30.0)
# What is no failure of a store: its answers, and faults of ours.
_ANSWERS = (
    FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError,
    VLVError, ValueError, TypeError, AttributeError, LookupError,
)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PIECE = 1 << 20  # bytes of a column that are read at a time; of a remote file eight times as many
_SIGNATURE = 28  # bytes of it behind the footer of an encrypted Parquet file whose footer is not
_SLASHES = re.compile(r"/+")
_WILDCARD = re.compile(r"[*?[]")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # what `_whole` names


def place(path: str | Path) -> Path:
    """The path or URL as an object with pathlib's methods."""
    if not is_url(path):
        return Path(path)
    # Listings are never cached: another process may have written since.
    found: Any = UPath(str(path), use_listings_cache=False)
    return found


def is_file(path: Path) -> bool:
    """False too for names that no file can have, where Path raises."""
    return _kind(path) == "file" if is_url(path) else os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """An object store has no folders: there it is what something lies under."""
    return _kind(path) == "directory" if is_url(path) else os.path.isdir(path)


def _kind(path: Path) -> str | None:
    """What lies at a URL. fsspec's `isfile` says no, too, where the store does not answer."""
    remote: Any = path
    try:
        kind: str = patiently(lambda: remote.fs.info(remote.path), path)["type"]
    except FileNotFoundError:
        return None
    return kind


def make_folder(folder: Path, setting: str) -> None:
    """Make an output folder; RunError in one line where the file system or the store refuses."""
    try:
        if is_url(folder):  # needs no folders, but a bucket that we may see
            remote: Any = folder
            patiently(lambda: remote.fs.info(remote.drive), folder)
        else:
            _check_writable(folder, setting)
            folder.mkdir(parents=True, exist_ok=True)
    except RunError:
        raise
    except FileNotFoundError:
        raise RunError(f"{setting}={folder}: there is no such bucket: make it first") from None
    except Exception as problem:  # stores raise errors of their own, without a common base
        reason = getattr(problem, "strerror", None) or problem
        raise RunError(f"{setting}={folder} cannot be made a folder: {reason}") from None


def _check_writable(folder: Path, setting: str) -> None:
    """Say whose the folder is, or the one that it would be made in: a new shared disk is root's."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise RunError(
            f"{setting}={folder} cannot be written: {there} belongs to user {there.stat().st_uid}, and "
            f"this job runs as user {os.geteuid()}: give it that user once (chown), or name another"
        )


def remove_file(file: Path) -> None:
    """Delete a file, if it is there."""
    if is_file(file):
        patiently(file.unlink, file)


def remove_folder(folder: Path) -> None:
    """Delete a folder with all that is in it, if it is there."""
    if not is_url(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remote: Any = folder
        with suppress(FileNotFoundError):
            patiently(lambda: remote.fs.rm(remote.path, recursive=True), folder)


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the store tells of all that lies at a URL, by name, sorted; none where nothing does.

    In a store a folder may have an empty name, as in `s3://bucket/a//b.jpg`. It is not listed; all
    files below it are, by names that begin with a slash (`/b.jpg`), as `folder / name` takes them.
    """
    remote: Any = folder
    try:
        found = patiently(lambda: remote.fs.ls(remote.path, detail=True), folder)
    except FileNotFoundError:
        return {}
    inside = len(remote.path.rstrip("/")) + 1
    named = {one["name"][inside:].rstrip("/"): one for one in found}
    if "" in named:
        below = patiently(lambda: remote.fs.find(remote.path, detail=True), folder)
        inner = {path[inside:]: one for path, one in below.items()}
        named |= {name: one for name, one in inner.items() if name[:1] == "/" != name[-1:]}
    return {name: named[name] for name in sorted(named) if name}


def stamp_of(files: Sequence[Path]) -> str:
    """A name for files as they are: another one when any of them was written anew."""
    digest = hashlib.sha256()
    for folder, some in groupby(files, key=lambda file: file.parent):
        remote = entries(folder) if is_url(folder) else {}
        for file in some:
            if is_url(file):
                # pathlib's parent and name leave out a folder whose name is empty.
                below = str(file)[len(str(folder).rstrip("/")) + 1 :]
                about = remote.get(below, {})
                written = about.get("ETag") or about.get("LastModified") or about.get("mtime")
                told = f"{about.get('size')} {written}"
            else:
                status = file.stat()
                told = f"{status.st_size} {status.st_mtime_ns}"
            digest.update(f"{file} {told}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none where it is not there."""
    if is_url(folder):
        return list(entries(folder))
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def files_below(folder: Path) -> list[Path]:
    """All files in a folder, at any depth, sorted; none where it is not there."""
    if not is_url(folder):
        found = (os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
        return sorted(Path(file) for file in found if os.path.isfile(file))
    remote: Any = folder
    names = patiently(lambda: remote.fs.find(remote.path), folder)
    inside = len(remote.path.rstrip("/")) + 1
    return sorted((folder / name[inside:] for name in names if name[inside:]), key=str)


def matching(pattern: str) -> list[Path]:
    """The files that a glob pattern names, sorted.

    A wildcard matches no folder whose name begins with an underscore or a dot: plans, commits and
    runs of a table of ours are no data, though they are Parquet, too. Raises DataError where a link
    leads nowhere: it would be passed over without a word.
    """
    found: Iterable[Path]
    if not is_url(pattern):
        found = (Path(p) for p in glob.glob(pattern, recursive=True) if not os.path.isdir(p))
    else:
        root = place(_WILDCARD.split(pattern)[0].rpartition("/")[0])
        below = pattern[len(str(root).rstrip("/")) + 1 :]
        found = _matching(root, below.split("/"))
    files = sorted((file for file in found if _is_meant(file, pattern)), key=str)
    check_files(files)
    return files


def check_files(files: Iterable[Path]) -> None:
    """Raise DataError where one of the files of a folder or of a pattern is none."""
    for file in files:
        if not is_url(file) and not os.path.isfile(file):
            raise DataError(f"{file} is no file: it may be a link to what is not there")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data by its name: plans, commits and logs, ours or others'."""
    return name.startswith((".", "_"))


def _is_meant(file: Path, pattern: str) -> bool:
    """Whether a pattern matched a file by no wildcard for what is hidden."""
    *named, last = pattern.split("/")
    *folders, name = str(file).split("/")
    if name.startswith(".") and not last.startswith("."):
        return False
    return {*named, last}.issuperset(folder for folder in folders if is_hidden(folder))


def _matching(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """fsspec's own glob passes over what a store does not answer for, and may return a part."""
    if "**" in names or "" in names:
        whole = re.compile(glob_translate("/".join(names)))
        inside = len(str(folder).rstrip("/")) + 1
        for file in files_below(folder):
            below = str(file)[inside:]
            # `**` stands for folders without a name, too.
            if whole.match(below) or (
                "" not in names and whole.match(_SLASHES.sub("/", below).lstrip("/"))
            ):
                yield file
        return
    wanted = re.compile(fnmatch.translate(names[0]))
    for name, one in entries(folder).items():
        if wanted.match(name):
            if one["type"] == "directory":
                yield from _matching(folder / name, names[1:]) if names[1:] else ()
            elif len(names) == 1:
                yield folder / name


# --------------------------------------------------------------------------------- whole files


def patiently(action: Callable[[], T], path: Path, pauses: Sequence[float] | None = None) -> T:
    """Do something with a remote file, again after a pause where the store fails for a while.

    What the store answers (not there, not permitted) is raised as it is; RunError, one line, where
    it does not answer after the `pauses` (seconds; by default about a minute in all).
    """
    if not is_url(path):
        return action()
    for pause in (*(_PATIENCE if pauses is None else pauses), None):
        try:
            return action()
        except _ANSWERS:
            raise
        except Exception as problem:  # clients raise errors of their own, without a common base
            if pause is None:
                raise _unanswered(path, problem) from problem
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _unanswered(path: Path, problem: Exception) -> RunError:
    return RunError(
        f"{path}: the store does not answer ({one_line(problem)}): when it does, the same command goes on "
        "where this one stopped"
    )


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
        patiently(lambda: path.write_bytes(data), path)
    else:
        write_pieces(path, [data])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file from pieces that memory need not hold together, whole or not at all."""
    if is_url(path):
        remote: Any = path
        with tempfile.TemporaryDirectory(prefix="vlv-file-") as folder:
            local = Path(folder, "whole")
            write_pieces(local, pieces)
            patiently(lambda: remote.fs.put_file(str(local), remote.path), path)
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


def write_parquet(path: Path, table: pa.Table, **options: Any) -> None:
    """Write one Parquet file, whole or not at all."""
    if is_url(path):
        # In memory first: a remote file that is closed by an error would be kept, cut.
        file = io.BytesIO()
        _write_rows(file, table, options)
        patiently(lambda: path.write_bytes(file.getvalue()), path)
        return
    with whole_file(path) as temporary:
        _write_rows(temporary, table, options)


def _write_rows(file: Path | IO[bytes], table: pa.Table, options: dict[str, Any]) -> None:
    if table.num_rows:
        pq.write_table(table, file, compression="zstd", **options)
    else:  # no row group: Hugging Face `datasets` fails at one without a row
        pq.ParquetWriter(file, table.schema).close()


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn what Arrow says of a damaged Parquet file into one DataError line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{file} is not there any more") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a readable Parquet file: {str(error)[:160]}") from error
    except Exception as error:
        if not is_url(file) or isinstance(error, _ANSWERS):
            raise
        raise _unanswered(file, error) from error


@contextmanager
def open_parquet(
    file: Path, in_pieces: bool = False, footer: pq.FileMetaData | None = None
) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read from; DataError where it is none.

    `in_pieces` for row groups that may be larger than memory: they are not fetched whole, as they
    are otherwise, in few requests. `footer` is the file's `metadata` of an earlier time, which is
    then not read again.
    """
    options: dict[str, Any] = {"pre_buffer": True}
    if in_pieces:
        options = {"pre_buffer": False, "buffer_size": _PIECE * (8 if is_url(file) else 1)}
    options["metadata"] = footer
    with readable(file):
        source: Any
        if is_url(file):
            source = patiently(lambda: file.open("rb"), file)
        else:
            source = pa.OSFile(os.fsencode(file))
        with source, pq.ParquetFile(source, **options) as parquet:
            if footer is None:
                _check_plain(parquet.metadata, source, file)
            yield parquet


def _check_plain(footer: pq.FileMetaData, source: IO[bytes], file: Path) -> None:
    """Refuse a file with encrypted columns under a footer that is not encrypted.

    Arrow ends the process (C++'s terminate) where the statistics of such a column are asked for. The
    footer's length counts its signature, which it is told by.
    """
    source.seek(-8, os.SEEK_END)
    if int.from_bytes(source.read(4), "little") == footer.serialized_size + _SIGNATURE:
        raise DataError(f"{file} has encrypted columns: write it anew without encryption")


def read_parquet_file(file: Path) -> pa.Table:
    """All of a small Parquet file."""
    with open_parquet(file) as parquet:
        return parquet.read()


def read_texts(files: list[Path]) -> list[str]:
    """The content of many small remote files, asked for at the same time."""
    paths: list[Any] = [*files]
    found = patiently(lambda: paths[0].fs.cat([path.path for path in paths]), files[0])
    return [found[path.path].decode() for path in paths]
