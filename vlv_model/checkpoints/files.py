"""The files of a checkpoint: `model.safetensors` and its manifest `checkpoint.json`. No pickles.

Checkpoints of a training run also have files with optimiser state, listed with their digests.

A stage-2 checkpoint names its stage-1 parent, which has the queries and the caption projector, by
relative path and digest. `vlv_model.checkpoints.weights` loads the tensors into modules.
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

from vlv_model.checkpoints.digests import sha256_of
from vlv_model.checkpoints.sources import CHECKPOINT_FILE
from vlv_model.config import Config, Lora, ModelConfig
from vlv_model.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1

StageName = Literal["stage1", "stage2"]


class CheckpointMetadata(Config):
    """The fields of checkpoint.json that the trainer supplies."""

    stage: StageName = Field(description="stage that trained these weights")
    step: int = Field(ge=0, description="optimiser updates done in this stage")
    rows_seen: int = Field(ge=0, description="training rows seen in this stage, with repeats")
    config: dict[str, Any] = Field(description="the resolved settings of the run")
    model: ModelConfig = Field(description="pretrained parts and sizes, folders absolute")
    parent: str | None = Field(None, description="checkpoint folder that this one builds on")


class Parent(Config):
    """The checkpoint whose weights are loaded first."""

    path: str = Field(description="its folder, relative to this checkpoint's folder")
    sha256: str = Field(description="digest of its weights file")


class CheckpointInfo(CheckpointMetadata):
    """The content of checkpoint.json."""

    format_version: int = Field(description="version of this layout")
    parent: Parent | None = Field(None, description="the checkpoint loaded first")  # type: ignore[assignment]
    merged_stages: list[StageName] = Field(
        [], description="stages of the parents merged into this file, oldest first"
    )
    base_models: dict[str, str] = Field(description="fingerprint of each pretrained part")
    origin: dict[str, Any] | None = Field(
        None, description="what an exported or imported checkpoint was made from"
    )
    lora: Lora = Field(
        Lora(), description="the adapters it contains instead of the language model's weights"
    )
    tensors: dict[str, list[int]] = Field(description="shape of each tensor in the weights file")
    sha256: str = Field(description="digest of the weights file")
    more_files: dict[str, str] = Field(
        {}, description="digest of each further file, which only a training run reads"
    )


Chain = list[tuple[Path, CheckpointInfo]]
"""A checkpoint and all its parents, oldest first."""


def read_checkpoint(folder: str | os.PathLike[str]) -> CheckpointInfo:
    """Read checkpoint.json. Raises CheckpointError when it is missing or malformed."""
    path = Path(folder) / CHECKPOINT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"'{path}' has format version {version}, this program reads {FORMAT_VERSION}: "
                "use the version of this program that wrote it"
            )
        return CheckpointInfo.model_validate(content)
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"'{folder}' is not a checkpoint, expected a folder with {CHECKPOINT_FILE} and "
            f"{WEIGHTS_FILE}: {one_line(problem)}"
        ) from problem


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `folder` when the block ends without an error.

    Raises CheckpointError when `folder` already exists.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise CheckpointError(f"'{folder}' already exists: save each checkpoint to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            # mkdtemp (0700) and safetensors (0600) hide the checkpoint from other users.
            path.chmod(0o755 if path.is_dir() else 0o644)
            _fsync(path)  # or a power failure could leave the name without the content
        temporary.rename(folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # does nothing after the rename


def _fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint_files(
    folder: Path,
    weights: Mapping[str, Tensor],
    about: Mapping[str, Any],
    more_files: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write weights and checkpoint.json into an existing folder, as `write_checkpoint` does."""
    from safetensors.torch import save_file  # imports torch, which reading manifests does not need

    try:
        save_file(dict(weights), folder / WEIGHTS_FILE)
        for name, tensors in (more_files or {}).items():
            save_file(dict(tensors), folder / name)
    except SafetensorError as error:  # such as a full disk
        raise CheckpointError(f"cannot write '{folder}': {one_line(error)}") from None
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
    """Write weights and checkpoint.json into a new folder, atomically. Returns its absolute path.

    `about` holds the fields of CheckpointInfo that do not follow from the weights; `more_files`
    are further safetensors files by name. Raises CheckpointError when `folder` already exists.
    """
    with new_folder(folder) as temporary:
        write_checkpoint_files(temporary, weights, about, more_files)
    return Path(folder).absolute()


def read_chain(folder: str | os.PathLike[str]) -> Chain:
    """The manifests of a checkpoint and all its parents, oldest first.

    Raises CheckpointError when a parent is missing or is not the recorded one.
    """
    folder = Path(folder)
    chain = [(folder, read_checkpoint(folder))]
    while (parent := chain[0][1].parent) is not None:
        path = (chain[0][0] / parent.path).resolve()
        if any(path == known.resolve() for known, _ in chain):
            raise CheckpointError(f"'{folder}' is its own ancestor: its parent chain is a circle")
        if not path.is_dir():
            raise CheckpointError(
                f"the parent of '{chain[0][0]}' is not at '{path}': move both together, so that "
                "their relative path stays the same"
            )
        info = read_checkpoint(path)
        if info.sha256 != parent.sha256:
            raise CheckpointError(
                f"'{path}' is not the parent that '{chain[0][0]}' was trained on: its weights "
                f"have digest {info.sha256[:12]}, expected {parent.sha256[:12]}"
            )
        if info.lora.rank:
            raise CheckpointError(
                f"'{path}', the parent of '{chain[0][0]}', has adapters (LoRA): export it with "
                "jobs/export.py, which merges them, and use the export as the parent"
            )
        chain.insert(0, (path, info))
    return chain


def verify_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Check the digests of a checkpoint's files and of its parents' weights.

    Raises CheckpointError when a file is missing or damaged.
    """
    chain = read_chain(folder)
    for path, info in chain:
        check_weights(path, info)
    last, about = chain[-1]
    for name, sha256 in about.more_files.items():
        check_file(last, name, sha256)


def stages_of(folder: str | os.PathLike[str], *, verify: bool = True) -> list[str]:
    """Stages that trained the weights of a checkpoint and its parents, oldest first.

    Checks the digests of the whole chain, so a job can fail before it loads a model;
    `verify=False` reads only the manifests. Raises CheckpointError when a file is missing or
    damaged.
    """
    chain = read_chain(folder)
    for path, info in chain if verify else []:
        check_weights(path, info)
    return chain_stages(chain)


def chain_stages(chain: Chain) -> list[str]:
    """Stages that trained the weights of a chain, oldest first."""
    return [stage for _, info in chain for stage in (*info.merged_stages, info.stage)]


def check_weights(folder: Path, info: CheckpointInfo) -> Path:
    """Path of the weights file. Raises CheckpointError unless it has the recorded digest."""
    return check_file(folder, WEIGHTS_FILE, info.sha256)


def check_file(folder: Path, name: str, sha256: str) -> Path:
    """Path of a checkpoint's file. Raises CheckpointError unless it exists with this digest."""
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
    """Open a safetensors file to read tensors one by one (`safe_open`).

    The file is memory-mapped: processes of a machine share its pages. Raises CheckpointError when
    it is not a safetensors file.
    """
    from safetensors import safe_open

    try:
        opened = safe_open(path, "pt")
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(
            f"'{path}' is not a safetensors file: {one_line(problem)}"
        ) from problem
    with opened as file:
        yield file


def shapes_in(file: Any) -> dict[str, list[int]]:
    """The shape of each tensor in an open file, by name."""
    return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def read_weights(folder: Path, info: CheckpointInfo) -> dict[str, Tensor]:
    """The tensors of one checkpoint, without its parents', on the CPU. Checks the digest."""
    with open_tensors(check_weights(folder, info)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
