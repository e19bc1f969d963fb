"""Training checkpoints: our weights in safetensors, DeepSpeed's optimiser state beside them.

    <run_dir>/checkpoints/step-00001000/
        model.safetensors   trainable weights (vlv_model.checkpoint)
        checkpoint.json     step, rows seen, settings, base models, parent
        optimizer/          DeepSpeed's files, one set for each worker
        optimizer.json      their digests; written by the run, checked before they are read

Workers write into folders of their own that Ray Train merges, so a checkpoint counts as finished
when every file that its two manifests name is there in full size. DeepSpeed's files are pickles:
they are opened only when their digests are the ones that this run noted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.places import write_atomically
from vlv_model.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = "checkpoints"
_TAG = "optimizer"


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def finished_checkpoints(run_dir: Path) -> Iterator[Path]:
    """Finished checkpoints of a run, newest first."""
    for folder in sorted((run_dir / FOLDER).glob("step-*"), reverse=True):
        if is_finished(folder):
            yield folder


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end."""
    return next(finished_checkpoints(run_dir), None)


def is_finished(folder: Path) -> bool:
    """True when all files that the manifests name are there, each in its size."""
    try:
        manifest = json.loads((folder / "optimizer.json").read_text())
        sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
        sizes["model.safetensors"] = manifest["model_size"]
        complete = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return complete and (folder / "checkpoint.json").is_file()
    except (OSError, ValueError, KeyError):
        return False


def gathered_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The trainable weights, whole, on the CPU of the ranks that `keep` them; empty on others.

    Called by all ranks together, since gathering needs all; kept where they are written, since
    all ranks of a machine could not hold them.
    Under ZeRO-3 a parameter is spread over the workers, and under bfloat16 the weights that training
    goes on with are DeepSpeed's float32 masters: both are asked of DeepSpeed.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Without ZeRO and bfloat16 there is no master: the parameter is it.
            kept_by_deepspeed = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
            master = safe_get_full_fp32_param(parameter) if kept_by_deepspeed else None
            if keep:
                weights[name] = (parameter if master is None else master).detach().cpu()
    return weights


def save_optimizer(engine: Any, folder: Path, world_rank: int, world_size: int) -> None:
    """Write DeepSpeed's state of this worker into `folder`, and from rank 0 the manifest.

    Called by every rank together, with a folder of its own each; rank 0's already holds
    `model.safetensors`.
    """
    import torch.distributed as dist

    from vlv_model.fingerprint import sha256_of

    engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
    for script in folder.glob("zero_to_*.py"):  # helpers that open the pickles unchecked
        script.unlink()
    mine = {
        str(file.relative_to(folder)): {"sha256": sha256_of(file), "size": file.stat().st_size}
        for file in sorted((folder / _TAG).iterdir())
    }
    gathered: list[dict[str, Any]] = [{}] * world_size
    dist.all_gather_object(gathered, mine)
    if world_rank == 0:
        manifest = {
            "world_size": world_size,
            "zero_stage": engine.zero_optimization_stage(),
            "model_size": (folder / "model.safetensors").stat().st_size,
            "files": {name: entry for files in gathered for name, entry in files.items()},
        }
        write_atomically(folder / "optimizer.json", json.dumps(manifest, indent=2))


def load_optimizer(engine: Any, folder: Path, world_size: int) -> None:
    """Restore DeepSpeed's state of this worker. The weights were loaded before, strictly.

    Raises CheckpointError when the files were written for another number of workers or another
    ZeRO stage, or are not the ones that the manifest names.
    """
    from vlv_model.fingerprint import sha256_of

    manifest = json.loads((folder / "optimizer.json").read_text())
    for setting, here in (
        ("train.num_workers", world_size),
        ("train.zero_stage", engine.zero_optimization_stage()),
    ):
        there = manifest["world_size" if setting.endswith("workers") else "zero_stage"]
        if there != here:
            raise CheckpointError(
                f"{folder} was written with {setting}={there}, this run has {here}: "
                f"continue it with {setting}={there}"
            )
    written = {f"{_TAG}/{file.name}" for file in (folder / _TAG).iterdir()}
    if strangers := written - set(manifest["files"]):
        raise CheckpointError(f"{folder} holds a file that its run did not write: {min(strangers)}")
    for name, entry in manifest["files"].items():
        if sha256_of(folder / name) != entry["sha256"]:
            raise CheckpointError(
                f"{folder / name} is not the file that its run wrote: digest differs"
            )
    # DeepSpeed's copy of the module has no frozen weights; ours has been loaded strictly.
    engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
