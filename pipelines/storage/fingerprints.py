"""Fingerprints of files, to notice that a job's input has changed.

    function               sees                                       recorded in
    content_fingerprint    size, first and last 64 KiB of each file   identity of tables made from lists
    size_fingerprint       relative path and size of each file        identity of tables of foreign images
    mtime_fingerprint      path, size, modification time or ETag      `stamp`: skips reading unchanged input

A path below the files' common root keeps the first two the same when the files are moved. Existing
tables store these values, so the formats must not change.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from pipelines.storage.files import is_url
from pipelines.storage.folders import list_remote
from vlv_model.errors import DataError

_END_BYTES = 1 << 16


def content_fingerprint(files: Sequence[Path]) -> dict[str, str]:
    """Per file its size and a digest of its first and last 64 KiB.

    The keys are paths below the files' common folder. Raises DataError for a file that cannot be opened.
    """
    folders = [str(file).split("/")[:-1] for file in files]
    # In sorted order, the first and the last path differ where any two paths do.
    pairs = list(zip(min(folders), max(folders), strict=False))
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    fingerprints = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                head = stream.read(_END_BYTES)
                stream.seek(max(0, size - _END_BYTES))
                digest = hashlib.blake2b(head + stream.read(), digest_size=8).hexdigest()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from None
        fingerprints["/".join(str(file).split("/")[common:])] = f"{size} bytes, {digest}"
    return fingerprints


def size_fingerprint(files: Mapping[str, Path]) -> str:
    """A hash of the files' sizes and of their relative paths, the keys of `files`: 16 hex digits."""
    digest = hashlib.sha256()
    for path, file in files.items():
        digest.update(f"{path} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def mtime_fingerprint(files: Sequence[Path]) -> str:
    """A hash of the files' paths, sizes and modification times (ETags in a store): 16 hex digits."""
    digest = hashlib.sha256()
    for folder, group in groupby(files, key=lambda file: file.parent):
        remote = list_remote(folder) if is_url(folder) else {}
        for file in group:
            if is_url(file):
                # pathlib's `parent` and `name` skip folders with an empty name.
                below = str(file)[len(str(folder).rstrip("/")) + 1 :]
                info = remote.get(below, {})
                modified = info.get("ETag") or info.get("LastModified") or info.get("mtime")
                state = f"{info.get('size')} {modified}"
            else:
                status = file.stat()
                state = f"{status.st_size} {status.st_mtime_ns}"
            digest.update(f"{file} {state}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
