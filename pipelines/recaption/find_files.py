"""The image files that the words of a command line name: files, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.images.rows import key_of
from pipelines.images.sources import is_image, walk
from pipelines.storage.files import is_url
from pipelines.storage.tables import Table
from vlv_model.errors import DataError

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True)
class NamedFile:
    """An image file: its path as the command line gives it, and the key that recaption would give it."""

    path: str
    key: int


def find_files(words: Sequence[str]) -> tuple[list[NamedFile], dict[str, str]]:
    """The image files of paths, folders (at any depth) and globs, each once; and the words without one,
    with the reason.

    In a folder the suffix decides what is an image, as in all jobs; a file that is named itself is
    always taken.
    """
    files: dict[str, NamedFile] = {}
    problems: dict[str, str] = {}
    for word in words:
        try:
            found = [NamedFile(path, key_of(name)) for path, name in _named_by(word)]
        except DataError as error:
            problems[word] = str(error)
            continue
        for file in found:
            files.setdefault(file.path, file)
    return list(files.values()), problems


def escaped(text: str) -> str:
    r"""Text as one field of a line: a tab as `\t`, a newline as `\n`, a backslash as `\\`."""
    return text.translate(_ESCAPES)


def _named_by(word: str) -> Iterator[tuple[str, str]]:
    """The paths that one word names, and what their keys are hashes of: the path below the word."""
    if is_url(word):
        raise DataError("is a URL: give files of this machine, or caption its table by recaption")
    if os.path.isdir(word):
        yield from _images_below(word)
    elif os.path.lexists(word) or not glob.has_magic(word):
        yield word, os.path.basename(word)  # one that is missing fails like one that is broken
    else:  # a glob that the shell did not expand
        matched = sorted(p for p in glob.glob(word, recursive=True) if not os.path.isdir(p))
        if not matched:
            raise DataError("matches no file")
        yield from ((path, os.path.basename(path)) for path in matched)


def _images_below(folder: str) -> Iterator[tuple[str, str]]:
    if Table(folder).exists:
        raise DataError(f"is a table: caption it by jobs/recaption.py data.input={folder}")
    paths = [
        str(parent / n) for parent, names in walk(Path(folder)) for n, _ in names if is_image(n)
    ]
    if not paths:
        raise DataError("is a folder without an image file (a suffix such as .jpg or .png)")
    yield from ((path, os.path.relpath(path, folder)) for path in paths)
