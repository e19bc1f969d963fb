"""Digests: of a file, exactly; of a pretrained model, cheaply.

A checkpoint holds trained weights only, and is worth nothing upon other frozen parts. So it keeps
a fingerprint of each pretrained part: gigabytes are sampled, not read.

An id of the hub, a commit of it and the digest of its files name one thing. Digests decide where
both are known; an id says nothing of files that are elsewhere.
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
# Of before: the bytes of config.json, and every safetensors file that lay there, read or not.
_ALL_FILES = "sha256:"

# What a library notes in a configuration about itself, and not about the model.
_NOTES = ("_name_or_path", "_commit_hash", "transformers_version", "_diffusers_version")
_COMMIT = re.compile(r"@[0-9a-f]{40}")  # in the name of a part
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a whole file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(source: Source | str | os.PathLike[str]) -> str:
    """`opened-sha256:...` of a pretrained part; of one that is not on this machine, its name.

    Taken from what is opened of it: its configuration, and of each file of its weights name,
    size, header and 64 KiB samples at even distances. So other variants of the weights that lie
    beside them do not count. Of a noise schedule it is the configuration, of a tokenizer
    tokenizer.json, or vocabulary and merges.
    """
    return fingerprint_like("", source if isinstance(source, Source) else Source(Path(source)))


def fingerprint_like(recorded: str, source: Source) -> str:
    """The fingerprint of a part by the rule that `recorded` was taken by; by today's of none."""
    folder = source.folder()
    opened = _opened_files(folder) if folder is not None else []
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
    """The fingerprints of some parts of a model, such as `florence` and `unet`, by part."""
    return {part: fingerprint(part_source(model, part)) for part in parts}


def is_same(recorded: str, source: Source) -> bool:
    """Whether a part is the one whose fingerprint was `recorded`, as far as can be told.

    Digests decide, by the rule of the recorded one. Of two names without a digest repository,
    commit and subfolder do. Where there is a digest on one side alone, nothing speaks against it.
    """
    here = fingerprint_like(recorded, source)
    if is_digest(recorded) != is_digest(here):
        return True
    if is_digest(recorded):
        return recorded == here
    names = [_COMMIT.sub("", name) for name in (recorded, here)]
    return recorded == here or (names[0] == names[1] and names[0] in (recorded, here))


def is_digest(recorded: str) -> bool:
    """Whether a fingerprint is one of files, and not the name of a part."""
    return recorded.startswith((_DIGEST, _ALL_FILES))


def short(recorded: str) -> str:
    """A fingerprint for people: twelve of its digits."""
    rule, colon, digits = recorded.rpartition(":")
    return f"{rule}:{digits[:12]}" if colon else recorded


def _opened_files(folder: Path) -> list[Path]:
    """The files of a part that `from_pretrained` reads; none where one of them is not there."""
    if (config := folder / "config.json").is_file():
        weights = _weight_files(config)
        there = weights and all(file.is_file() for file in weights)
        return [config, *weights] if there else []
    if (schedule := folder / "scheduler_config.json").is_file():
        return [schedule]
    found = ([folder / name for name in names] for names in _TOKENIZERS)
    return next((files for files in found if all(file.is_file() for file in files)), [])


def _weight_files(config: Path) -> list[Path]:
    """The files of weights beside a configuration; of one library an index goes before a file."""
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
    """A JSON object; an empty one of a file that holds none, whose load will say it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _without_notes(settings: Any) -> Any:
    if isinstance(settings, list):
        return [_without_notes(value) for value in settings]
    if isinstance(settings, dict):
        return {n: _without_notes(value) for n, value in settings.items() if n not in _NOTES}
    return settings


def _settings(path: Path) -> bytes:
    """A configuration without libraries' notes, in one spelling; its bytes where it is none."""
    settings = _without_notes(_parsed(path))
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
