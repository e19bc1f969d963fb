"""The folder of a training run: whose it is, what it started from, and how it ended.

<run_dir>/run.json       what the run is: its settings, data and models
<run_dir>/rows/          see kept_rows
<run_dir>/checkpoints/   see checkpointing
<run_dir>/parent/        what the run started from, so that the folder stands alone
<run_dir>/metrics.jsonl  see metrics
<run_dir>/samples/       see samples
<run_dir>/validation/    the list of data.validation
<run_dir>/result.json    written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.cli.config import build, dump
from pipelines.execution import checkpoints
from pipelines.images.listing import list_images
from pipelines.images.random_access import RowIndex
from pipelines.images.sources import find_source
from pipelines.storage.files import write_atomically
from pipelines.storage.folders import remove_folder
from pipelines.storage.tables import check_same_settings, check_unused, read_json_object
from pipelines.training import checkpointing
from pipelines.training.config import Stage1Config, Stage2Config, Stage2TrainConfig
from pipelines.training.metrics import columns_read, heldout_losses, read_metrics
from vlv_model.checkpoints.files import read_checkpoint
from vlv_model.checkpoints.sources import PLACES
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError

RESULT = "result.json"
VALIDATION, _VALIDATION = "validation", "data.validation"  # the folder, the setting

# Settings that may change when a run is continued: they say how it is run, not what it computes.
FREE = ("ray", "run_dir", "data.input", "data.latents", "data.output", "data.validation", "train.wandb", "train.max_failures",
        "train.keep_checkpoints", "train.checkpoint_every", "train.eval_every", "train.prefetch", "train.readers",
        "train.cpus_per_worker", "train.use_gpu", "train.num_workers", "train.zero_stage",
        "train.offload_optimizer", "train.tf32", "train.activation_checkpointing", "train.compile",
        "train.samples")  # fmt: skip


def settle(config: Stage1Config | Stage2Config, run_dir: Path) -> Stage1Config | Stage2Config:
    """`config` with the size of its micro-batches: what the run began with, if it was not given.

    Its default follows from the number of workers, which may change, and may not change what is
    drawn for a micro-batch. Raises ConfigError where it does not fit the workers of today.
    """
    if config.train.micro_batch_size is not None:
        return config
    size = config.train.rows_at_once
    if (run_dir / "run.json").is_file():
        size = read_json_object(run_dir / "run.json").get("train.micro_batch_size") or size
    # Only what was given: a setting of `model` that is given wins over the folder's.
    values = config.model_dump(mode="json", exclude_unset=True)
    values.setdefault("train", {})["micro_batch_size"] = size
    return build(type(config), values)


def check_start(config: Stage1Config | Stage2Config, checkpoint: Path | None) -> None:
    """Refuse what could only fail on a worker, after the models were loaded."""
    from vlv_model.checkpoints.weights import read_checkpoint, stages_of

    # Its files are looked at once: a run that has begun goes on from what it kept of them.
    begun = (Path(config.run_dir) / "parent").is_dir()
    stages = stages_of(checkpoint, verify=not begun) if checkpoint else []
    if checkpoint and read_checkpoint(checkpoint).lora.rank:
        raise CheckpointError(
            f"model.path: '{checkpoint}' holds adapters (LoRA) upon a language model: export it with "
            "jobs/export.py, which merges them, and name that folder"
        )
    if isinstance(config, Stage2Config) and "stage1" not in stages:
        raise CheckpointError(
            "model.path has to name a stage-1 run or checkpoint: stage 2 reads what the encoder "
            "learned to say there"
        )
    if isinstance(config, Stage1Config) and "stage2" in stages:
        raise CheckpointError("model.path names a stage-2 run: stage 1 goes on from stage 1 only")


def identity(
    config: Stage1Config | Stage2Config,
    model: ModelConfig,
    checkpoint: Path | None,
    files: list[Path],
    rows: tuple[RowIndex, RowIndex],
    there: Mapping[str, Any],
) -> dict[str, Any]:
    """All that decides what the run computes, flat, so that a difference can be named.

    `there` is what is `recorded` of the run: a base model that is the same one is called what it
    is called there.
    """
    from vlv_model.checkpoints.fingerprint import fingerprint_parts

    values = {**dump(config), "model": model.model_dump()}
    flat = {k: v for k, v in _flatten(values) if not k.startswith(FREE)}
    flat["rows"] = [len(index) for index in rows]
    flat["keys"] = [index.digest() for index in rows]
    # Stored latents are rounded ones, wherever they lie.
    flat["latents"] = "stored" if getattr(config.data, "latents", None) else None
    flat["bytes"] = sum(file.stat().st_size for file in files)
    parts = parts_read(config)
    digests = fingerprint_parts(model, parts)
    flat |= {f"model.{part} digest": digest for part, digest in digests.items()}
    flat |= _recorded_names(model, digests, there)
    if checkpoint is not None:
        digest = hashlib.sha256((checkpoint / "checkpoint.json").read_bytes()).hexdigest()
        flat["parent"] = digest[:16]
    return flat


def parts_read(config: Stage1Config | Stage2Config) -> tuple[str, ...]:
    """The pretrained parts that a run is built from."""
    from vlv_model import VLVAutoEncoder, VLVCaptioner

    return (VLVCaptioner if isinstance(config, Stage2Config) else VLVAutoEncoder).read_parts


def recorded(run_dir: Path) -> dict[str, Any]:
    """The identity of the run that a folder holds, from run.json; nothing of a folder without one.

    A base model that was not on the driver's machine yet when the run began has its digest from
    the run's newest checkpoint.
    """
    from vlv_model.checkpoints.fingerprint import is_digest

    if not os.path.isfile(run_dir / "run.json"):
        return {}
    there = read_json_object(run_dir / "run.json")
    last = checkpoints.latest_checkpoint(run_dir)
    for part, digest in (read_checkpoint(last).base_models if last else {}).items():
        if not is_digest(there.get(f"model.{part} digest") or ""):
            there[f"model.{part} digest"] = digest
    return there


def base_models(there: Mapping[str, Any]) -> dict[str, str]:
    """Where a run that is `recorded` has its base models from, by field of ModelConfig."""
    fields = {name.removeprefix("model."): value for name, value in there.items()}
    return {name: fields[name] for name in ModelConfig.model_fields if fields.get(name)}


def _recorded_names(
    model: ModelConfig, digests: Mapping[str, str], there: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of `there` on base models that are the same here, by whatever name.

    Digests of the files (`digests` are today's, by part) decide; where one is not known, the ids of
    the hub or the folders do.
    """
    from vlv_model.checkpoints.fingerprint import is_digest, is_same
    from vlv_model.checkpoints.sources import field_of, part_source

    differing, names = set(), {}
    for part, here in digests.items():
        source, digest = part_source(model, part), f"model.{part} digest"
        known = there.get(digest) or ""
        if is_digest(known) and is_digest(here):
            same = known == here or is_same(known, source)
        else:
            own = there.get(f"model.{part}")
            same = bool(own) == (not source.subfolder) and source.may_be(
                own or there.get("model.diffusion") or ""
            )
        if same:
            names[digest] = there.get(digest)
        else:
            differing.add(field_of(model, part))
    for field in set(PLACES) - differing:
        if f"model.{field}" in there:
            names[f"model.{field}"] = there[f"model.{field}"]
    return names


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, value))
    return flat


def check_free(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another run or something else; RunError names what differs."""
    if os.path.isfile(run_dir / "run.json"):
        # A setting that came into being after the run had begun: it ran as its default does. What
        # only stage 2 has is not in the identity of a stage 1.
        newer = _flatten({"train": dump(Stage2TrainConfig()), "model": ModelConfig().model_dump()})
        there = {name: value for name, value in newer if name in identity}
        there |= recorded(run_dir)
        check_same_settings(run_dir, there, identity, "run_dir")
    else:
        check_unused(run_dir, ("pairs",), "run", "run_dir")


def claim(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Make a folder that `check_free` has passed this run's."""
    check_free(run_dir, identity)
    if not (run_dir / "run.json").is_file():
        write_atomically(run_dir / "run.json", json.dumps(identity, indent=2))


def check_validation(path: str) -> None:
    """Raise DataError where there are no images at `data.validation`."""
    find_source(path, setting=_VALIDATION)


def validation_rows(run_dir: Path, path: str) -> RowIndex:
    """The images of `data.validation`, listed anew: there may be others than when the run began."""
    remove_folder(run_dir / VALIDATION)
    listed, _ = list_images(run_dir / VALIDATION, path, setting=_VALIDATION)
    return RowIndex.open(listed)


def keep_parent(run_dir: Path, checkpoint: Path | None) -> Path | None:
    """Keep what the run starts from in its folder: one checkpoint, merged with its own parents."""
    if checkpoint is None:
        return None
    from vlv_model.checkpoints.weights import merge_checkpoint

    kept = run_dir / "parent"
    return kept if kept.is_dir() else merge_checkpoint(checkpoint, kept)


def tidy(run_dir: Path, keep: int) -> None:
    """Before a fit: drop surplus checkpoints, and Ray Train's notes on its last fit.

    Ray Train is told of no checkpoint: the newest finished one is found in the folder.
    """
    checkpointing.prune(run_dir, keep)
    for snapshot in (run_dir / checkpoints.FOLDER).glob("checkpoint_manager_snapshot*"):
        snapshot.unlink()


def write_result(config: Stage1Config | Stage2Config, run_dir: Path) -> dict[str, Any]:
    losses, last = heldout_losses(run_dir), checkpoints.latest_checkpoint(run_dir)
    steps = [event["step"] for event in read_metrics(run_dir) if event["event"] == "eval"]
    if last is None or config.train.steps not in steps:
        raise RuntimeError(f"training of {run_dir} ended without a checkpoint or an evaluation")
    result = {
        "loss_before": losses.get(min(steps)),
        "loss_after": losses.get(config.train.steps),
        "steps": config.train.steps,
        "rows_seen": config.train.steps * config.train.global_batch_size,
        "checkpoint": str(last.relative_to(run_dir)),
        "columns_read": columns_read(run_dir),
    }
    write_atomically(run_dir / RESULT, json.dumps(result, indent=2))
    return result
