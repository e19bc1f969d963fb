"""The folder of a training run: its identity, its parent checkpoint and its result.

<run_dir>/run.json       identity: settings, data and models
<run_dir>/rows/          see run_rows and skipped_rows
<run_dir>/images/        listing of images that are not in our tables (pipelines.images.listing)
<run_dir>/captions/      of stage 2; see caption_index
<run_dir>/checkpoints/   see checkpointing
<run_dir>/parent/        copy of the checkpoint that the run started from
<run_dir>/metrics.jsonl  see metrics
<run_dir>/samples/       see samples
<run_dir>/report.html    see report
<run_dir>/validation/    index of the images of data.validation
<run_dir>/result.json    written last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from glob import has_magic
from pathlib import Path
from typing import Any

from pipelines.cli.config import build, dump
from pipelines.execution.model import CHECKPOINTS, latest_checkpoint
from pipelines.images.listing import list_images, recorded_listing
from pipelines.images.random_access import RowIndex
from pipelines.images.selection import ImageInput
from pipelines.images.sources import find_source
from pipelines.storage.files import is_url, write_atomically
from pipelines.storage.folders import remove_folder
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import (
    check_same_settings,
    check_unused,
    parquet_files,
    read_json_object,
)
from pipelines.training import checkpointing
from pipelines.training.caption_index import FOLDER as CAPTIONS
from pipelines.training.config import Stage1Config, Stage2Config, Stage2TrainConfig
from pipelines.training.metrics import columns_read, heldout_losses, read_metrics
from pipelines.training.run_rows import DATA_FIELDS
from vlv_model.checkpoints.digests import fingerprint_parts
from vlv_model.checkpoints.files import read_checkpoint, stages_of
from vlv_model.checkpoints.layouts import read_parts
from vlv_model.checkpoints.sources import SOURCE_FIELDS
from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, DataError, RunError

IDENTITY, RESULT = "run.json", "result.json"
VALIDATION, IMAGES = "validation", "images"  # folders
LEFTOVERS = (CAPTIONS, IMAGES, "pairs")  # in the folder of a run that was killed before it began
_VALIDATION_SETTING = "data.validation"

_INPUT_SETTINGS = ("image_column", "key_column", "where", "features", "image_encoding")

# Settings that may change when a run continues, since they do not change what it computes.
CHANGEABLE = ("ray", "run_dir", "dry_run", "estimate", "data.input", "data.captions", "data.latents", "data.validation", "train.wandb", "train.max_failures",
        "train.keep_checkpoints", "train.checkpoint_every", "train.eval_every", "train.readers",
        "train.cpus_per_worker", "train.use_gpu", "train.num_workers", "train.zero_stage",
        "train.offload_optimizer", "train.tf32", "train.activation_checkpointing", "train.compile",
        "train.samples")  # fmt: skip


def with_micro_batch_size(
    config: Stage1Config | Stage2Config, run_dir: Path
) -> Stage1Config | Stage2Config:
    """Fill in `train.micro_batch_size` if it is not set: what the run began with, else the default.

    The default depends on the number of workers, which may change, while dropout is seeded per
    micro-batch. Raises ConfigError when it does not fit the current number of workers.
    """
    if config.train.micro_batch_size is not None:
        return config
    size = config.train.rows_at_once
    if (run_dir / IDENTITY).is_file():
        size = read_json_object(run_dir / IDENTITY).get("train.micro_batch_size") or size
    # Only explicit settings, since an explicit `model` setting overrides the folder's.
    values = config.model_dump(mode="json", exclude_unset=True)
    values.setdefault("train", {})["micro_batch_size"] = size
    return build(type(config), values)


def check_start(config: Stage1Config | Stage2Config, checkpoint: Path | None) -> None:
    """Raise CheckpointError for a `model.path` that would fail later, on a worker."""
    # Verify only once: a run that has begun continues from its own copy.
    has_copy = (Path(config.run_dir) / "parent").is_dir()
    stages = stages_of(checkpoint, verify=not has_copy) if checkpoint else []
    if checkpoint and read_checkpoint(checkpoint).lora.rank:
        raise CheckpointError(
            f"model.path: '{checkpoint}' holds LoRA adapters: merge them with jobs/export.py and give "
            "the exported folder"
        )
    if isinstance(config, Stage2Config) and "stage1" not in stages:
        raise CheckpointError(
            "model.path must be a stage-1 run or checkpoint: stage 2 needs its trained encoder"
        )
    if isinstance(config, Stage1Config) and "stage2" in stages:
        raise CheckpointError("model.path is a stage-2 run: stage 1 can only start from stage 1")


def settings_identity(
    config: Stage1Config | Stage2Config,
    model: ModelConfig,
    checkpoint: Path | None,
    recorded: Mapping[str, Any],
) -> dict[str, Any]:
    """All settings and models that decide what the run computes, as a flat dictionary.

    `recorded` is the identity in the run folder. A base model with the same weights keeps the name that
    it has there.
    """
    values = {**dump(config), "model": model.model_dump()}
    flat = {k: v for k, v in flatten(values) if not k.startswith(CHANGEABLE)}
    if isinstance(config, Stage2Config):  # as earlier versions recorded the only one
        flat["data.caption_column"] = ",".join(config.data.caption_column)
    # Stored latents are rounded, so they count; their path does not.
    flat["latents"] = "stored" if getattr(config.data, "latents", None) else None
    parts = parts_read(config, model)
    digests = fingerprint_parts(model, parts)
    flat |= {f"model.{part} digest": digest for part, digest in digests.items()}
    flat |= _recorded_names(model, digests, recorded)
    if checkpoint is not None:
        digest = hashlib.sha256((checkpoint / "checkpoint.json").read_bytes()).hexdigest()
        flat["parent"] = digest[:16]
    return flat


def list_run_images(
    config: Stage1Config | Stage2Config, settings: Mapping[str, Any]
) -> tuple[list[Path], dict[str, Any]]:
    """The Parquet files of a table of the run's images, and what identifies their bytes.

    Images that are not in our tables are listed in the run folder, once for each way to ask for them:
    a run whose images were moved compares the new listing and keeps the old one. The folder is shared,
    so all machines see the listing. `settings` are those of the identity: a folder of another run is
    refused before anything is written into it.
    """
    data, run_dir = config.data, Path(config.run_dir)
    texts = []
    if isinstance(config, Stage2Config) and config.data.captions is None:
        texts = [config.data.column_of(0)]
    encoding = data.image_encoding
    request = data.input, data.image_column, data.key_column, data.where
    asked = json.dumps([*request, encoding, texts, data.features])
    folder = run_dir / IMAGES / hashlib.sha256(asked.encode()).hexdigest()[:8]
    # A folder that is listed is not walked again: it may hold millions of files.
    is_listed = (recorded_listing(folder) or {}).get("layout") == "folder"
    if data.where is None and not is_listed:
        source = find_source(data.input, data.image_column, data.key_column, encoding=encoding)
        if source.layout == "table":
            is_glob = not is_url(data.input) and has_magic(data.input)
            files = list(source.files) if is_glob else parquet_files(data.input)
            return files, {"bytes": sum(file.stat().st_size for file in files)}
        if texts and source.layout != "parquet":
            raise DataError(f"data.input={data.input} has no column {texts[0]}: give data.captions")
    check_same_run(run_dir, settings, without=(*DATA_FIELDS, "data.captions"))
    with lock_folder(run_dir, "run_dir"):
        files, identity = list_images(
            folder, *request, again=True, encoding=encoding, features=data.features, texts=texts
        )
    return files, {"bytes": None, "files": None, **identity}


def parts_read(config: Stage1Config | Stage2Config, model: ModelConfig) -> tuple[str, ...]:
    """The pretrained parts that a run loads."""
    return read_parts("stage2" if isinstance(config, Stage2Config) else "stage1", model)


def recorded(run_dir: Path) -> dict[str, Any]:
    """The identity in a folder's run.json; empty when there is none.

    The digest of a base model that the driver had not downloaded when the run began is taken from the
    newest checkpoint.
    """
    from vlv_model.checkpoints.digests import is_digest

    if not os.path.isfile(run_dir / IDENTITY):
        return {}
    identity = read_json_object(run_dir / IDENTITY)
    latest = latest_checkpoint(run_dir)
    for part, digest in (read_checkpoint(latest).base_models if latest else {}).items():
        if not is_digest(identity.get(f"model.{part} digest") or ""):
            identity[f"model.{part} digest"] = digest
    return identity


def base_models(recorded: Mapping[str, Any]) -> dict[str, str]:
    """The base models in a recorded identity, by field of ModelConfig."""
    fields = {name.removeprefix("model."): value for name, value in recorded.items()}
    return {name: fields[name] for name in ModelConfig.model_fields if fields.get(name)}


def _recorded_names(
    model: ModelConfig, digests: Mapping[str, str], recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of `recorded` for base models that are the same now, perhaps under another name.

    Compares file digests (`digests` has the current ones, by part); where one is unknown, hub ids or
    folders.
    """
    from vlv_model.checkpoints.digests import is_digest, matches_fingerprint
    from vlv_model.checkpoints.sources import field_of, part_source

    differing, names = set(), {}
    for part, digest in digests.items():
        source, entry = part_source(model, part), f"model.{part} digest"
        recorded_digest = recorded.get(entry) or ""
        if is_digest(recorded_digest) and is_digest(digest):
            same = recorded_digest == digest or matches_fingerprint(recorded_digest, source)
        else:
            recorded_source = recorded.get(f"model.{part}")
            same = bool(recorded_source) == (not source.subfolder) and source.may_match(
                recorded_source or recorded.get("model.diffusion") or ""
            )
        if same:
            names[entry] = recorded.get(entry)
        else:
            differing.add(field_of(model, part))
    for field in set(SOURCE_FIELDS) - differing:
        if f"model.{field}" in recorded:
            names[f"model.{field}"] = recorded[f"model.{field}"]
    return names


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (full name, value)."""
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += flatten(value, f"{prefix}{name}.")
        else:
            flat.append((prefix + name, value))
    return flat


def check_same_run(
    run_dir: Path, identity: Mapping[str, Any], without: Collection[str] = ()
) -> None:
    """Raise RunError when the folder holds another run, naming the differences, or other files.

    Fields `without` which the identity is given are not compared.
    """
    if os.path.isfile(run_dir / IDENTITY):
        # Settings newer than the run count as their defaults. `name in identity` leaves out
        # stage 2's settings in stage 1.
        defaults = flatten(
            {
                "train": dump(Stage2TrainConfig()),
                "model": ModelConfig().model_dump(),
                "data": {name: ImageInput.model_fields[name].default for name in _INPUT_SETTINGS},
            }
        )
        recorded_identity = {name: value for name, value in defaults if name in identity}
        recorded_identity |= recorded(run_dir)
        for name in without:
            recorded_identity.pop(name, None)
        _check_steps(run_dir, recorded_identity, identity)
        recorded_identity["train.steps"] = identity["train.steps"]
        check_same_settings(run_dir, recorded_identity, identity, "run_dir")
    else:
        check_unused(run_dir, LEFTOVERS, "run", "run_dir")


def _check_steps(run_dir: Path, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise RunError unless the run goes on as it would have with the current `train.steps`.

    A constant learning rate is the same in a longer run, so these steps may be raised. A decaying one
    would have been another from the first step on.
    """
    before, now = recorded.get("train.steps"), current["train.steps"]
    schedule = current.get("train.schedule")
    if before in (None, now) or recorded.get("train.schedule") != schedule:
        return
    if schedule != "constant":
        raise RunError(
            f"output folder {run_dir} holds another run (train.steps: {before} there, {now} here), and "
            f"train.schedule={schedule} decays over exactly these steps: to train on from its weights, "
            f"give model.path={run_dir} and another run_dir (a run with train.schedule=constant goes on "
            "when train.steps is raised)"
        )
    if now < before:
        raise RunError(
            f"output folder {run_dir} holds another run (train.steps: {before} there, {now} here): "
            "train.steps can be raised, not lowered"
        )


def claim(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Check the folder (`check_same_run`) and write the identity into it if it is new.

    If `train.steps` was raised, the run is not finished any more.
    """
    check_same_run(run_dir, identity)
    file = run_dir / IDENTITY
    if not file.is_file():
        write_atomically(file, json.dumps(identity, indent=2))
        return
    written = read_json_object(file)
    if written["train.steps"] != identity["train.steps"]:
        (run_dir / RESULT).unlink(missing_ok=True)  # first: a kill in between changes nothing
        written["train.steps"] = identity["train.steps"]
        write_atomically(file, json.dumps(written, indent=2))


def check_validation(path: str) -> None:
    """Raise DataError when there are no images at `data.validation`."""
    find_source(path, setting=_VALIDATION_SETTING)


def validation_rows(run_dir: Path, path: str) -> RowIndex:
    """List the images of `data.validation` again, since they may change while the run is stopped."""
    remove_folder(run_dir / VALIDATION)
    files, _ = list_images(run_dir / VALIDATION, path, setting=_VALIDATION_SETTING)
    return RowIndex.open(files)


def keep_parent(run_dir: Path, checkpoint: Path | None) -> Path | None:
    """Copy the start checkpoint, merged with its own parents, into the run folder."""
    if checkpoint is None:
        return None
    from vlv_model.checkpoints.weights import merge_checkpoint

    copy = run_dir / "parent"
    return copy if copy.is_dir() else merge_checkpoint(checkpoint, copy)


def tidy(run_dir: Path, keep: int) -> None:
    """Before a fit: delete surplus checkpoints and Ray Train's snapshot of its last fit.

    Ray Train does not track our checkpoints; workers find the newest finished one in the folder.
    """
    checkpointing.prune(run_dir, keep)
    for snapshot in (run_dir / CHECKPOINTS).glob("checkpoint_manager_snapshot*"):
        snapshot.unlink()


def write_result(config: Stage1Config | Stage2Config, run_dir: Path) -> dict[str, Any]:
    """Write result.json and return its content."""
    losses, latest = heldout_losses(run_dir), latest_checkpoint(run_dir)
    steps = [event["step"] for event in read_metrics(run_dir) if event["event"] == "eval"]
    if latest is None or config.train.steps not in steps:
        raise RuntimeError(f"training of {run_dir} ended without a checkpoint or an evaluation")
    result = {
        "loss_before": losses.get(min(steps)),
        "loss_after": losses.get(config.train.steps),
        "steps": config.train.steps,
        "rows_seen": config.train.steps * config.train.global_batch_size,
        "checkpoint": str(latest.relative_to(run_dir)),
        "columns_read": columns_read(run_dir),
    }
    write_atomically(run_dir / RESULT, json.dumps(result, indent=2))
    return result
