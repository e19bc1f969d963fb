"""A checkpoint's folder: `model.safetensors` with `checkpoint.json` beside it. No pickle anywhere.

A training's checkpoint has more files of tensors beside them (the optimiser's), with their digests.

A stage-2 checkpoint names its stage-1 parent, which holds the queries and the caption projector,
by a path relative to itself and by digest. This module knows the files; what the tensors mean to
a module is `vlv_model.checkpoints.weights`'s business.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from safetensors import SafetensorError

from vlv_model.checkpoints.fingerprint import sha256_of
from vlv_model.checkpoints.sources import CHECKPOINT_FILE
from vlv_model.config import Config, Lora, ModelConfig
from vlv_model.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1

StageName = Literal["stage1", "stage2"]


class CheckpointMetadata(Config):
    """What the trainer says about a checkpoint; the rest of checkpoint.json follows from it."""

    stage: StageName = Field(description="which loss trained these weights")
    step: int = Field(ge=0, description="optimiser updates done in this stage")
    rows_seen: int = Field(ge=0, description="training rows seen in this stage, repeats counted")
    config: dict[str, Any] = Field(description="the resolved settings of the run")
    model: ModelConfig = Field(description="pretrained parts and sizes, folders absolute")
    parent: str | None = Field(None, description="checkpoint folder that this one builds upon")


class Parent(Config):
    """The checkpoint whose weights are applied first."""

    path: str = Field(description="its folder, relative to this checkpoint's folder")
    sha256: str = Field(description="digest of its weights file")


class CheckpointInfo(CheckpointMetadata):
    """The content of checkpoint.json."""

    format_version: int = Field(description="version of this layout")
    parent: Parent | None = Field(None, description="the checkpoint applied first")  # type: ignore[assignment]
    merged_stages: list[StageName] = Field(
        [], description="stages of the parents whose weights are in this file, the oldest first"
    )
    base_models: dict[str, str] = Field(description="fingerprint of each pretrained part")
    origin: dict[str, Any] | None = Field(
        None, description="what an exported or imported checkpoint was made of"
    )
    lora: Lora = Field(
        Lora(), description="the adapters that it holds in the language model's place"
    )
    tensors: dict[str, list[int]] = Field(description="shape of each tensor in the weights file")
    sha256: str = Field(description="digest of the weights file")
    more_files: dict[str, str] = Field(
        {}, description="digest of each further file, which only a training reads"
    )


Chain = list[tuple[Path, CheckpointInfo]]
"""A checkpoint and all its parents, the oldest first."""


def read_checkpoint(folder: str | os.PathLike[str]) -> CheckpointInfo:
    """checkpoint.json of a checkpoint's folder. Raises CheckpointError when there is none."""
    path = Path(folder) / CHECKPOINT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"'{path}' has format version {version}, this program reads {FORMAT_VERSION}: "
                "use the version of the program that wrote it"
            )
        return CheckpointInfo.model_validate(content)
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"'{folder}' is no checkpoint, expected a folder with {CHECKPOINT_FILE} and "
            f"{WEIGHTS_FILE}: {one_line(problem)}"
        ) from problem


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `folder` at the end: whole or not at all.

    Raises CheckpointError when `folder` exists already.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise CheckpointError(f"'{folder}' exists already: save each checkpoint to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            # mkdtemp's 0700 and safetensors' 0600 would hide the checkpoint from other users.
            path.chmod(0o755 if path.is_dir() else 0o644)
            _flush(path)  # or a machine that loses power keeps the name and not the content
        temporary.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already after the rename


def _flush(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_checkpoint(
    folder: Path,
    weights: Mapping[str, Tensor],
    about: Mapping[str, Any],
    more_files: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write weights and checkpoint.json into a folder; arguments as in `write_checkpoint`."""
    from safetensors.torch import save_file  # here: the files are told of without torch

    try:
        save_file(dict(weights), folder / WEIGHTS_FILE)
        for name, tensors in (more_files or {}).items():
            save_file(dict(tensors), folder / name)
    except SafetensorError as error:  # a full disk, for one
        raise CheckpointError(f"'{folder}' cannot be written: {one_line(error)}") from None
    info = CheckpointInfo(
        format_version=FORMAT_VERSION,
        tensors={name: list(tensor.shape) for name, tensor in weights.items()},
        sha256=sha256_of(folder / WEIGHTS_FILE),
        more_files={name: sha256_of(folder / name) for name in more_files or {}},
        **about,
    )
    text = info.model_dump_json(indent=2)
    (folder / CHECKPOINT_FILE).write_text(text + "\n", encoding="utf-8")


def write_checkpoint(
    folder: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    about: Mapping[str, Any],
    more_files: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write weights and checkpoint.json, all or nothing: beside `folder`, which is then renamed.

    `about` holds the fields of CheckpointInfo that do not follow from the weights; `more_files`
    are further safetensors files by name. Raises CheckpointError when `folder` exists already.
    """
    with new_folder(folder) as temporary:
        put_checkpoint(temporary, weights, about, more_files)
    return Path(folder).absolute()


def read_chain(folder: str | os.PathLike[str]) -> Chain:
    """The manifests of a checkpoint and all its parents, the oldest first.

    Raises CheckpointError for a parent that is missing or another than the one built upon.
    """
    folder = Path(folder)
    chain = [(folder, read_checkpoint(folder))]
    while (parent := chain[0][1].parent) is not None:
        path = (chain[0][0] / parent.path).resolve()
        if any(path == known.resolve() for known, _ in chain):
            raise CheckpointError(f"'{folder}' is its own ancestor: its parent chain is a circle")
        if not path.is_dir():
            raise CheckpointError(
                f"the parent of '{chain[0][0]}' is not at '{path}': keep both at the places that "
                "they had to each other"
            )
        info = read_checkpoint(path)
        if info.sha256 != parent.sha256:
            raise CheckpointError(
                f"'{path}' is not the parent that '{chain[0][0]}' was trained upon: its weights "
                f"have digest {info.sha256[:12]}, expected {parent.sha256[:12]}"
            )
        if info.lora.rank:
            raise CheckpointError(
                f"'{path}', which '{chain[0][0]}' builds upon, holds adapters (LoRA): export it with "
                "jobs/export.py, which merges them, and build upon that"
            )
        chain.insert(0, (path, info))
    return chain


def verify_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Hold every file of a checkpoint, and its parents' weights, against its digest.

    Raises CheckpointError where one is missing or damaged.
    """
    chain = read_chain(folder)
    for path, info in chain:
        check_weights(path, info)
    last, about = chain[-1]
    for name, sha256 in about.more_files.items():
        check_file(last, name, sha256)


def check_weights(folder: Path, info: CheckpointInfo) -> Path:
    """The weights file of a checkpoint; CheckpointError unless it has the manifest's digest."""
    return check_file(folder, WEIGHTS_FILE, info.sha256)


def check_file(folder: Path, name: str, sha256: str) -> Path:
    """A file of a checkpoint; CheckpointError unless it is there and has this digest."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"'{folder}' lacks {name}: copy the whole folder")
    digest = sha256_of(path)
    if digest != sha256:
        raise CheckpointError(
            f"'{path}' is damaged: its digest is {digest[:12]}, {CHECKPOINT_FILE} says "
            f"{sha256[:12]}: copy it again"
        )
    return path


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, of which tensors are read one by one (`safe_open`).

    Processes of one machine that read the same file share what the system keeps of it in memory.
    Raises CheckpointError where it is none.
    """
    from safetensors import safe_open

    try:
        opened = safe_open(path, "pt")
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"'{path}' is no safetensors file: {one_line(problem)}") from problem
    with opened as file:
        yield file


def shapes_in(file: Any) -> dict[str, list[int]]:
    """The shape of each tensor in an open file, by name."""
    return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def read_weights(folder: Path, info: CheckpointInfo) -> dict[str, Tensor]:
    """The tensors of one checkpoint, without its parents', on the CPU."""
    with open_tensors(check_weights(folder, info)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
