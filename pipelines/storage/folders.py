"""Folders on disks and in object stores: made, listed, matched by patterns, removed."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from fsspec.utils import glob_translate

from pipelines.storage.files import as_path, kind_of
from pipelines.storage.protocols import is_url
from pipelines.storage.retries import with_retries
from vlv_model.errors import DataError, RunError

_SLASHES = re.compile(r"/+")
_WILDCARD = re.compile(r"[*?[]")


def is_folder(path: Path) -> bool:
    """An object store has no folders: there it is what something lies under."""
    return kind_of(path) == "directory" if is_url(path) else os.path.isdir(path)


def make_folder(folder: Path, setting: str) -> None:
    """Make an output folder; RunError in one line where the file system or the store refuses."""
    try:
        if is_url(folder):  # needs no folders, but a bucket that we may see
            remote: Any = folder
            with_retries(lambda: remote.fs.info(remote.drive), folder)
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


def remove_folder(folder: Path) -> None:
    """Delete a folder with all that is in it, if it is there."""
    if not is_url(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remote: Any = folder
        with suppress(FileNotFoundError):
            with_retries(lambda: remote.fs.rm(remote.path, recursive=True), folder)


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the store tells of all that lies at a URL, by name, sorted; none where nothing does.

    In a store a folder may have an empty name, as in `s3://bucket/a//b.jpg`. It is not listed; all
    files below it are, by names that begin with a slash (`/b.jpg`), as `folder / name` takes them.
    """
    remote: Any = folder
    try:
        found = with_retries(lambda: remote.fs.ls(remote.path, detail=True), folder)
    except FileNotFoundError:
        return {}
    inside = len(remote.path.rstrip("/")) + 1
    named = {one["name"][inside:].rstrip("/"): one for one in found}
    if "" in named:
        below = with_retries(lambda: remote.fs.find(remote.path, detail=True), folder)
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
    names = with_retries(lambda: remote.fs.find(remote.path), folder)
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
        root = as_path(_WILDCARD.split(pattern)[0].rpartition("/")[0])
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
