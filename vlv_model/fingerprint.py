"""Digests: of a file, exactly; of a pretrained model, cheaply.

A checkpoint holds trained weights only, and is worth nothing upon other frozen parts. So it keeps
a fingerprint of each pretrained part: gigabytes are sampled, not read.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from vlv_model.config import ModelConfig
from vlv_model.sources import local_folder, part_source

SAMPLE_BYTES = 64 * 1024
SAMPLES_PER_FILE = 16
_DIGEST = "sha256:"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(source: str | os.PathLike[str], subfolder: str = "") -> str:
    """`sha256:...` of a pretrained part: a folder, or a hub id that is in the local hub cache.

    Taken from config.json and, of every safetensors file, its name, size, header and 64 KiB
    samples at even distances. A hub id that is not cached is its own fingerprint.
    """
    folder = local_folder(str(source))
    if folder is None:
        return f"{source}/{subfolder}" if subfolder else str(source)
    folder = folder / subfolder
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
        else:
            _update_with_samples(digest, path)
    return _DIGEST + digest.hexdigest()


def fingerprint_parts(model: ModelConfig, parts: Iterable[str]) -> dict[str, str]:
    """The fingerprints of some parts of a model, such as `florence` and `unet`, by part."""
    return {part: fingerprint(*part_source(model, part)) for part in parts}


def same_fingerprint(one: str, other: str) -> bool:
    """False when both are digests and differ: the id of an uncached model says nothing."""
    both_digests = one.startswith(_DIGEST) and other.startswith(_DIGEST)
    return one == other or not both_digests


def _update_with_samples(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)  # safetensors: length of the JSON header, little-endian
        header = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        digest.update(prefix + file.read(min(header, size)))
        last = max(0, size - SAMPLE_BYTES)
        for i in range(SAMPLES_PER_FILE):
            file.seek(last * i // (SAMPLES_PER_FILE - 1))
            digest.update(file.read(SAMPLE_BYTES))
