"""Finds the files of a list of URLs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from pipelines.lists.readers import SUFFIXES, format_of
from pipelines.storage.files import as_path, is_file, is_url
from pipelines.storage.folders import check_files, files_below, is_folder, is_hidden, matching_files
from vlv_model.errors import DataError

_UNSUPPORTED = (".bz2", ".xz", ".zst", ".zstd", ".lz4", ".br", ".zip", ".snappy")  # compressions


def input_files(path: str, setting: str = "data.input") -> list[Path]:
    """The metadata files of a setting: one file, those of a folder, or the matches of a glob.

    Raises DataError if there are none, for a broken link, and for an unsupported compression.
    """
    where = as_path(path)
    if is_file(where):
        return [where]
    folder = is_folder(where)
    files = _lists_below(where) if folder else matching_files(path)
    if not files:
        what = "holds no metadata" if folder else "does not exist"
        shown = path if len(path) <= 200 else f"{path[:200]}…"
        raise DataError(f"{setting}={shown} {what}: expected {', '.join(SUFFIXES)} files")
    return files


def input_bytes(files: Iterable[Path]) -> int:
    """Total size of the files on disk, in bytes."""
    return sum(file.stat().st_size for file in files)


def _lists_below(folder: Path) -> list[Path]:
    """The lists in a folder; DataError for a broken link or an unsupported compression."""
    files = _visible_below(folder)
    for file in files:
        if file.suffix.lower() in _UNSUPPORTED and format_of(file.with_suffix("")) in SUFFIXES:
            raise DataError(
                f"{file}: lists are read uncompressed or gzip-compressed: decompress it"
            )
    lists = [file for file in files if format_of(file) in SUFFIXES]
    if others := [file for file in lists if format_of(file) != ".json"]:
        _warn_of_notes([file for file in lists if file not in set(others)])
        lists = others
    check_files(lists)
    return lists


def _warn_of_notes(files: list[Path]) -> None:
    """Warn that .json files beside lists of other formats are ignored.

    img2dataset and the Hugging Face hub leave such notes.
    """
    if files:
        print(
            f"warning: {len(files):,} .json files beside lists of other formats are taken for notes and "
            f"ignored (the first: {files[0]}): give a glob that matches them to read them",
            file=sys.stderr,
        )


def _visible_below(folder: Path) -> list[Path]:
    """All files in a folder, sorted, following links to folders; broken links are included.

    Files and folders whose name begins with a dot or an underscore are left out: they are notes,
    temporary files and logs of the tools that wrote the folder. Raises OSError for a folder that cannot
    be read.
    """
    if is_url(folder):
        prefix = len(str(folder))
        files = files_below(folder)
        return [f for f in files if not any(map(is_hidden, str(f)[prefix:].split("/")))]
    found = []
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        found += [Path(parent, name) for name in names if not is_hidden(name)]
        for name in sorted(folders):  # links may form a cycle
            real = os.path.realpath(os.path.join(parent, name))
            if is_hidden(name) or real in seen:
                folders.remove(name)
            seen.add(real)
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error
