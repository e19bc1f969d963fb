"""The files that a list of URLs is made of: which they are, and what tells one list from another."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.lists.readers import SUFFIXES, format_of
from pipelines.storage.files import as_path, is_file
from pipelines.storage.folders import check_files, files_below, is_folder, is_hidden, matching_files
from pipelines.storage.protocols import is_url
from vlv_model.errors import DataError

_PACKED = (".bz2", ".xz", ".zst", ".zstd", ".lz4", ".br", ".zip", ".snappy")  # not read


def input_files(path: str) -> list[Path]:
    """The metadata files behind `data.input`: a file, a folder's, or those that a glob matches.

    Raises DataError where there are none, and for one that is not there or is not read.
    """
    where = as_path(path)
    if is_file(where):
        return [where]
    folder = is_folder(where)
    files = _lists_below(where) if folder else matching_files(path)
    if not files:
        what = "holds no metadata" if folder else "does not exist"
        shown = path if len(path) <= 200 else f"{path[:200]}…"
        raise DataError(f"data.input={shown} {what}: expected {', '.join(SUFFIXES)} files")
    return files


def input_bytes(files: Iterable[Path]) -> int:
    """Size of the files together, compressed or not."""
    return sum(file.stat().st_size for file in files)


def fingerprint(files: Sequence[Path]) -> dict[str, str]:
    """What tells one list from another: per file its size and a digest of its two ends.

    Files go by their path in the folder that they have in common, so a moved list is the same.
    Raises DataError for a file that cannot be opened.
    """
    folders = [str(file).split("/")[:-1] for file in files]
    ends = list(zip(min(folders), max(folders), strict=False))
    common = next((i for i, (a, b) in enumerate(ends) if a != b), len(ends))
    prints = {}
    for file in files:
        end = 1 << 16
        try:
            with file.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                head = stream.read(end)
                stream.seek(max(0, size - end))
                digest = hashlib.blake2b(head + stream.read(), digest_size=8).hexdigest()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from None
        prints["/".join(str(file).split("/")[common:])] = f"{size} bytes, {digest}"
    return prints


def _lists_below(folder: Path) -> list[Path]:
    """The lists in a folder; DataError for one that is not there, or packed as we do not read it."""
    files = _visible_below(folder)
    for file in files:
        if file.suffix.lower() in _PACKED and format_of(file.with_suffix("")) in SUFFIXES:
            raise DataError(f"{file}: lists are read plain or compressed by gzip: unpack it")
    lists = [file for file in files if format_of(file) in SUFFIXES]
    if others := [file for file in lists if format_of(file) != ".json"]:
        _say_notes([file for file in lists if file not in set(others)])
        lists = others
    check_files(lists)
    return lists


def _say_notes(files: list[Path]) -> None:
    """Say that .json files beside lists of other formats are notes on them: img2dataset and the hub
    leave some.
    """
    if files:
        print(
            f"warning: {len(files):,} .json files beside lists of other formats are taken for notes, not "
            f"for lists (the first: {files[0]}): name them by a glob to read them",
            file=sys.stderr,
        )


def _visible_below(folder: Path) -> list[Path]:
    """All files in a folder, links to folders followed, sorted.

    Not those whose name, or whose folder's, begins with a dot or an underscore: they are notes,
    halves and logs of the tools that wrote the folder. A link that leads nowhere is among them.
    Raises OSError for a folder that may not be read.
    """
    if is_url(folder):
        inside = len(str(folder))
        files = files_below(folder)
        return [f for f in files if not any(map(is_hidden, str(f)[inside:].split("/")))]
    found = []
    seen = {os.path.realpath(folder)}
    for at, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        found += [Path(at, name) for name in names if not is_hidden(name)]
        for name in sorted(folders):  # a link may lead back to where it lies
            real = os.path.realpath(os.path.join(at, name))
            if is_hidden(name) or real in seen:
                folders.remove(name)
            seen.add(real)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error
