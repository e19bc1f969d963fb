"""Lists the images in a tar shard by their byte offsets.

Members are never extracted, so absolute names and `..` do no harm.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import IO, Any

from pipelines.images.companions import MAX_BYTES, attach, is_companion
from pipelines.images.external import BROKEN_LINK, DAMAGED, as_utf8, listed_row
from pipelines.images.sources import is_image
from pipelines.pictures.formats import Encoding
from vlv_model.errors import DataError

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Errors that tarfile raises for impossible headers.
_DAMAGES = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError)


_COMPANIONS = frozenset([
    ".json", ".jsonl", ".txt", ".text", ".caption", ".transcript", ".cls", ".cls2", ".cbor", ".csv", ".tsv",
    ".npy", ".npz", ".pth", ".pt", ".pyd", ".pickle", ".pkl", ".parquet", ".yaml", ".yml", ".xml", ".html",
    ".md", ".index", ".inx", ".id", ".ten", ".tb", ".mp", ".msg", ".safetensors",
])  # fmt: skip
"""Suffixes of the other files of a sample, in shards of WebDataset and other tools."""


def list_shard(
    shard: Path,
    name: str,
    others: Counter[str] | None = None,
    encoding: Encoding = "file",
    with_metadata: bool = False,
) -> list[dict[str, Any]]:
    """A LISTED_ROW for each image of an encoding in a tar shard; the images' names begin with `name`.

    Files whose suffix is neither that of an image nor that of a companion are counted in `others`, by
    suffix. A damaged shard gives the rows of its intact part and one row with size DAMAGED. Raises
    DataError if the shard is compressed or cannot be read. `with_metadata` adds the columns of
    pipelines.images.companions.METADATA.
    """
    path = str(shard)
    rows: list[dict[str, Any]] = []
    used: set[str] = set()
    skipped: Counter[str] = Counter() if others is None else others
    locations: dict[str, tuple[int, int]] = {}  # offset and size of possible link targets
    links: list[tuple[str, str]] = []
    stems: list[str] = []  # of the images in `rows`
    companions: dict[str, bytes] = {}

    def unique_name(member: tarfile.TarInfo) -> str:
        """The name of an image; repeated names get the member's offset appended."""
        full = f"{name}/{as_utf8(member.name)}"
        full = f"{full}@{member.offset}" if full in used else full
        used.add(full)
        return full

    try:
        with shard.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            end, total = 0, shard.stat().st_size
            try:
                while end <= total and (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
                    if member.size < 0:  # tarfile would seek backwards, in an endless loop
                        raise tarfile.ReadError("a member of negative size")
                    end = member.offset_data + member.size
                    if member.isreg():
                        size = member.size if end <= total else DAMAGED
                        locations[posixpath.normpath(member.name)] = (member.offset_data, size)
                    hidden = posixpath.basename(member.name)[:1] == "."
                    # As in a folder, hidden files are skipped: macOS writes companions of images.
                    if not is_image(member.name, encoding) or hidden:
                        if with_metadata and member.isreg() and is_companion(member.name):
                            stream.seek(member.offset_data)
                            companions[member.name] = stream.read(min(member.size, MAX_BYTES))
                        suffix = posixpath.splitext(member.name)[1].lower()
                        if member.isreg() and not hidden and suffix not in _COMPANIONS:
                            skipped[suffix] += 1
                        continue
                    if member.isreg():
                        rows.append(listed_row(unique_name(member), path, member.offset_data, size))
                        stems.append(posixpath.splitext(member.name)[0])
                    elif member.islnk() or member.issym():
                        links.append((unique_name(member), _target(member)))
                complete = end <= total and _is_complete(stream, end)
            except _DAMAGES:
                complete = False
            for link, target in links:
                location = locations.get(target, (0, BROKEN_LINK))
                rows.append(listed_row(link, path, *location))
                stems.append(posixpath.splitext(link[len(name) + 1 :])[0])
            if not complete:
                rows.append(listed_row(f"{name} from byte {end}", path, end, DAMAGED))
    except _DAMAGES as error:
        _check_uncompressed(shard)
        rows.append(listed_row(f"{name} ({error})", path, 0, DAMAGED))
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error}") from None
    return attach(rows, stems, companions) if with_metadata else rows


def _target(link: tarfile.TarInfo) -> str:
    """The name of a link's target; the target of a symbolic link is relative to the link."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _is_complete(stream: IO[bytes], end: int) -> bool:
    """Whether an archive whose last member ends at `end` is followed by zeros only."""
    stream.seek(end + -end % tarfile.BLOCKSIZE)
    first = stream.read(tarfile.BLOCKSIZE)
    rest = iter(partial(stream.read, 1 << 20), b"")
    return bool(first) and not any(piece.strip(b"\0") for piece in (first, *rest))


def _check_uncompressed(shard: Path) -> None:
    """Raise DataError for a compressed shard, whatever its suffix."""
    with shard.open("rb") as stream:
        head = stream.read(6)
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{shard} is compressed ({what}): decompress it to .tar")
