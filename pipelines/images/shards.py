"""What lies in a tar shard: the images that are its members, each by its place in the file.

Members are never unpacked, so their names lead nowhere: absolute ones and `..` are names as others.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import IO, Any

from pipelines.images.external import ASTRAY, DAMAGED, as_utf8, listed_row
from pipelines.images.sources import is_image
from vlv_model.errors import DataError

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# What tarfile raises of headers that say what cannot be.
_DAMAGES = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError)


_COMPANIONS = frozenset([
    ".json", ".jsonl", ".txt", ".text", ".caption", ".transcript", ".cls", ".cls2", ".cbor", ".csv", ".tsv",
    ".npy", ".npz", ".pth", ".pt", ".pyd", ".pickle", ".pkl", ".parquet", ".yaml", ".yml", ".xml", ".html",
    ".md", ".index", ".inx", ".id", ".ten", ".tb", ".mp", ".msg", ".safetensors",
])  # fmt: skip
"""Suffixes of what lies beside the images of a sample, in WebDataset's shards and others."""


def members(shard: Path, below: str, others: Counter[str] | None = None) -> list[dict[str, Any]]:
    """A row (`LISTED_ROW`) for each image of a tar shard, which is called `below` in their names.

    Files that are neither images by their names nor what lies beside them are counted in `others`,
    by suffix. A shard that is damaged gives its sound part, and a row that says so. Raises DataError for one that is
    compressed, or cannot be read.
    """
    path = str(shard)
    rows: list[dict[str, Any]] = []
    taken: set[str] = set()
    counted: Counter[str] = Counter() if others is None else others
    places: dict[str, tuple[int, int]] = {}  # of what links may name
    links: list[tuple[str, str]] = []

    def title(member: tarfile.TarInfo) -> str:
        """What an image is called: of several members of one name all but the first by their place."""
        name = f"{below}/{as_utf8(member.name)}"
        name = f"{name}@{member.offset}" if name in taken else name
        taken.add(name)
        return name

    try:
        with shard.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            end, total = 0, shard.stat().st_size
            try:
                while end <= total and (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all
                    if member.size < 0:  # after it tarfile would go back, for ever
                        raise tarfile.ReadError("a member of negative size")
                    end = member.offset_data + member.size
                    if member.isreg():
                        size = member.size if end <= total else DAMAGED
                        places[posixpath.normpath(member.name)] = (member.offset_data, size)
                    hidden = posixpath.basename(member.name)[:1] == "."
                    # As in a folder: hidden files are no images, but what macOS keeps of them.
                    if not is_image(member.name) or hidden:
                        suffix = posixpath.splitext(member.name)[1].lower()
                        if member.isreg() and not hidden and suffix not in _COMPANIONS:
                            counted[suffix] += 1
                        continue
                    if member.isreg():
                        rows.append(listed_row(title(member), path, member.offset_data, size))
                    elif member.islnk() or member.issym():
                        links.append((title(member), _target(member)))
                whole = end <= total and _ends(stream, end)
            except _DAMAGES:
                whole = False
            for name, target in links:
                rows.append(listed_row(name, path, *places.get(target, (0, ASTRAY))))
            if not whole:
                rows.append(listed_row(f"{below} from byte {end}", path, end, DAMAGED))
    except _DAMAGES as error:
        _refuse_packed(shard)
        rows.append(listed_row(f"{below} ({error})", path, 0, DAMAGED))
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error}") from None
    return rows


def _target(link: tarfile.TarInfo) -> str:
    """The member that a link names: a hard one by its name, a symbolic one from where it lies."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _ends(stream: IO[bytes], end: int) -> bool:
    """Whether an archive ends behind its last member: with zeros, and nothing after them."""
    stream.seek(end + -end % tarfile.BLOCKSIZE)
    first = stream.read(tarfile.BLOCKSIZE)
    rest = iter(partial(stream.read, 1 << 20), b"")
    return bool(first) and not any(piece.strip(b"\0") for piece in (first, *rest))


def _refuse_packed(shard: Path) -> None:
    """Raise DataError for a shard that is compressed, whatever it is called."""
    with shard.open("rb") as stream:
        head = stream.read(6)
    for magic, what in _PACKED.items():
        if head.startswith(magic):
            raise DataError(f"{shard} is compressed ({what}): unpack it, to .tar")
