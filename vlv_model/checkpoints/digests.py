"""Digests of files, and fingerprints of pretrained models.

A checkpoint has trained weights only, which are useless with other frozen parts. So it records a
fingerprint of each pretrained part, computed from samples of its files instead of all gigabytes.

A part that is not on this machine has its hub id instead of a digest. Two digests are compared; a
digest and a hub id are not comparable and count as equal.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlv_model.checkpoints.sources import Source, part_source
from vlv_model.config import ModelConfig

SAMPLE_BYTES = 64 * 1024
SAMPLES_PER_FILE = 16
_DIGEST = "opened-sha256:"
# Fingerprints of older versions: config.json as bytes and every safetensors file in the folder.
_ALL_FILES = "sha256:"

# Configuration keys about the library that wrote it, not about the model.
_LIBRARY_KEYS = ("_name_or_path", "_commit_hash", "transformers_version", "_diffusers_version")
_COMMIT = re.compile(r"@[0-9a-f]{40}")  # in the hub id of a part
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(source: Source | str | os.PathLike[str]) -> str:
    """`opened-sha256:...` of a pretrained part, or its name if it is not on this machine.

    Covers the files that `from_pretrained` opens: the configuration, and of each weights file its
    name, size, header and evenly spaced samples of 64 KiB. Other variants of the weights in the
    folder do not count. For a noise schedule it covers the configuration; for a tokenizer
    tokenizer.json, or vocabulary and merges.
    """
    return fingerprint_like("", source if isinstance(source, Source) else Source(Path(source)))


def fingerprint_like(recorded: str, source: Source) -> str:
    """The fingerprint of a part by the same rule as `recorded`; by default the current rule."""
    folder = source.folder()
    opened = opened_files(folder) if folder is not None else []
    if folder is None or not opened:
        return str(source)
    return _digest_of_all_files(folder) if recorded.startswith(_ALL_FILES) else _digest(opened)


def _digest(opened: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in opened:
        if path.suffix == ".safetensors":
            _update_with_samples(digest, path)
        else:
            is_settings = path.name.endswith("config.json")
            digest.update(_settings(path) if is_settings else path.read_bytes())
    return _DIGEST + digest.hexdigest()


def fingerprint_parts(model: ModelConfig, parts: Iterable[str]) -> dict[str, str]:
    """The fingerprints of a model's parts, such as `florence` and `unet`, by part."""
    return {part: fingerprint(part_source(model, part)) for part in parts}


def matches_fingerprint(recorded: str, source: Source) -> bool:
    """Whether a part can be the one whose fingerprint was `recorded`.

    Two digests are compared by the rule of the recorded one, two names by repository, commit and
    subfolder. A digest and a name are not comparable: True.
    """
    current = fingerprint_like(recorded, source)
    if is_digest(recorded) != is_digest(current):
        return True
    if is_digest(recorded):
        return recorded == current
    names = [_COMMIT.sub("", name) for name in (recorded, current)]
    return recorded == current or (names[0] == names[1] and names[0] in (recorded, current))


def is_digest(recorded: str) -> bool:
    """Whether a fingerprint is a digest of files, not the name of a part."""
    return recorded.startswith((_DIGEST, _ALL_FILES))


def short(recorded: str) -> str:
    """A fingerprint to display: the first twelve digits."""
    rule, colon, digits = recorded.rpartition(":")
    return f"{rule}:{digits[:12]}" if colon else recorded


def opened_files(folder: Path) -> list[Path]:
    """The files of a part that `from_pretrained` reads; empty if one is missing."""
    if (config := folder / "config.json").is_file():
        weights = _weight_files(config)
        complete = weights and all(file.is_file() for file in weights)
        return [config, *weights] if complete else []
    if (schedule := folder / "scheduler_config.json").is_file():
        return [schedule]
    candidates = ([folder / name for name in names] for names in _TOKENIZERS)
    return next((files for files in candidates if all(file.is_file() for file in files)), [])


def _weight_files(config: Path) -> list[Path]:
    """The weights files that belong to a configuration. diffusers prefers an index to one file."""
    diffusers = "_class_name" in _parsed(config)
    stem = "diffusion_pytorch_model" if diffusers else "model"
    single = config.with_name(f"{stem}.safetensors")
    index = config.with_name(f"{stem}.safetensors.index.json")
    if index.is_file() and (diffusers or not single.is_file()):
        files = _parsed(index).get("weight_map")
        names = {str(name) for name in files.values()} if isinstance(files, dict) else set()
        return [config.with_name(Path(name).name) for name in sorted(names)]
    return [single]


def _parsed(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none (loading the model reports that)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _without_library_keys(settings: Any) -> Any:
    if isinstance(settings, list):
        return [_without_library_keys(value) for value in settings]
    if isinstance(settings, dict):
        kept = {n: value for n, value in settings.items() if n not in _LIBRARY_KEYS}
        return {n: _without_library_keys(value) for n, value in kept.items()}
    return settings


def _settings(path: Path) -> bytes:
    """A configuration without the library's keys, as canonical JSON; malformed ones as bytes."""
    settings = _without_library_keys(_parsed(path))
    return json.dumps(settings, sort_keys=True).encode() if settings else path.read_bytes()


def _digest_of_all_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        if path.suffix == ".json":
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
        else:
            _update_with_samples(digest, path)
    return _ALL_FILES + digest.hexdigest()


def _update_with_samples(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}\n".encode())
    with open(path, "rb") as file:
        prefix = file.read(8)  # safetensors: length of the JSON header, little-endian
        header = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        digest.update(prefix + file.read(min(header, size)))
        last = max(0, size - SAMPLE_BYTES)
        for i in range(SAMPLES_PER_FILE):
            file.seek(last * i // (SAMPLES_PER_FILE - 1))
            digest.update(file.read(SAMPLE_BYTES))
