"""Folders on disks and in object stores: create, list, match patterns, remove."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.utils import glob_translate

from pipelines.storage.files import as_path, is_url, remote_type, with_retries
from vlv_model.errors import DataError, RunError

_SLASHES = re.compile(r"/+")
_WILDCARD = re.compile(r"[*?[]")


def is_folder(path: Path) -> bool:
    """Whether a folder exists. In an object store: whether any object lies below the path."""
    return remote_type(path) == "directory" if is_url(path) else os.path.isdir(path)


def make_folder(folder: Path, setting: str) -> None:
    """Create an output folder. Raises RunError, naming `setting`, if it cannot be created."""
    try:
        if is_url(folder):  # a store needs no folder, only a bucket that exists
            remote: Any = folder
            with_retries(lambda: remote.fs.info(remote.drive), folder)
        else:
            _check_writable(folder, setting)
            folder.mkdir(parents=True, exist_ok=True)
    except RunError:
        raise
    except FileNotFoundError:
        raise RunError(f"{setting}={folder}: there is no such bucket: create it first") from None
    except Exception as error:  # store clients have no common base class of errors
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{setting}={folder} cannot be created: {reason}") from None


def _check_writable(folder: Path, setting: str) -> None:
    """Raise RunError if this user may not write to the folder or its nearest existing parent.

    A new shared disk belongs to root.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(
            f"{setting}={folder} cannot be written: {existing} belongs to user "
            f"{existing.stat().st_uid}, and this job runs as user {os.geteuid()}: change its owner "
            "(chown), or name another folder"
        )


def remove_folder(folder: Path) -> None:
    """Delete a folder with its content if it exists."""
    if not is_url(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remote: Any = folder
        with suppress(FileNotFoundError):
            with_retries(lambda: remote.fs.rm(remote.path, recursive=True), folder)


def list_remote(folder: Path) -> dict[str, dict[str, Any]]:
    """fsspec's info about each entry at a URL, sorted by name; empty if nothing lies there.

    Object stores allow folders with an empty name, as in `s3://bucket/a//b.jpg`. Such a folder is not
    listed itself. All files below it are, with names that begin with a slash (`/b.jpg`), so that
    `folder / name` leads to them.
    """
    remote: Any = folder
    try:
        listing = with_retries(lambda: remote.fs.ls(remote.path, detail=True), folder)
    except FileNotFoundError:
        return {}
    prefix = len(remote.path.rstrip("/")) + 1
    named = {info["name"][prefix:].rstrip("/"): info for info in listing}
    if "" in named:
        below = with_retries(lambda: remote.fs.find(remote.path, detail=True), folder)
        inner = {path[prefix:]: info for path, info in below.items()}
        named |= {name: info for name, info in inner.items() if name[:1] == "/" != name[-1:]}
    return {name: named[name] for name in sorted(named) if name}


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; empty if it does not exist."""
    if is_url(folder):
        return list(list_remote(folder))
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def files_below(folder: Path) -> list[Path]:
    """All files in a folder, at any depth, sorted; empty if it does not exist."""
    if not is_url(folder):
        paths = (os.path.join(parent, n) for parent, _, names in os.walk(folder) for n in names)
        return sorted(Path(path) for path in paths if os.path.isfile(path))
    remote: Any = folder
    names = with_retries(lambda: remote.fs.find(remote.path), folder)
    prefix = len(remote.path.rstrip("/")) + 1
    return sorted((folder / name[prefix:] for name in names if name[prefix:]), key=str)


def matching_files(pattern: str) -> list[Path]:
    """The files that a glob pattern matches, sorted.

    A wildcard matches no folder whose name begins with an underscore or a dot: the plans, commits and
    runs of a table are Parquet files too, but not data. Raises DataError for a broken link, which
    would otherwise be skipped silently.
    """
    found: Iterable[Path]
    if not is_url(pattern):
        found = (Path(p) for p in glob.glob(pattern, recursive=True) if not os.path.isdir(p))
    else:
        root = as_path(_WILDCARD.split(pattern)[0].rpartition("/")[0])
        below = pattern[len(str(root).rstrip("/")) + 1 :]
        found = _match_remote(root, below.split("/"))
    files = sorted((file for file in found if _is_wanted(file, pattern)), key=str)
    check_files(files)
    return files


def check_files(files: Iterable[Path]) -> None:
    """Raise DataError if one of the listed local files is not a file."""
    for file in files:
        if not is_url(file) and not os.path.isfile(file):
            raise DataError(f"{file} is not a file: it may be a broken link")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not data by its name (leading dot or underscore)."""
    return name.startswith((".", "_"))


def _is_wanted(file: Path, pattern: str) -> bool:
    """Whether every hidden name in the path is spelt out in the pattern."""
    *named, last = pattern.split("/")
    *folders, name = str(file).split("/")
    if name.startswith(".") and not last.startswith("."):
        return False
    return {*named, last}.issuperset(folder for folder in folders if is_hidden(folder))


def _match_remote(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Glob in a store. fsspec's own glob ignores errors of the store and may return a part."""
    if "**" in names or "" in names:
        whole = re.compile(glob_translate("/".join(names)))
        prefix = len(str(folder).rstrip("/")) + 1
        for file in files_below(folder):
            below = str(file)[prefix:]
            # `**` also matches folders with an empty name.
            if whole.match(below) or (
                "" not in names and whole.match(_SLASHES.sub("/", below).lstrip("/"))
            ):
                yield file
        return
    wanted = re.compile(fnmatch.translate(names[0]))
    for name, info in list_remote(folder).items():
        if wanted.match(name):
            if info["type"] == "directory":
                yield from _match_remote(folder / name, names[1:]) if names[1:] else ()
            elif len(names) == 1:
                yield folder / name
