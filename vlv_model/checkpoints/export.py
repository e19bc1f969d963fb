"""Exports a trained model as one self-contained folder: a checkpoint with its base models.

    checkpoint.json      the checkpoint's, with paths relative to the folder, and `origin`
    model.safetensors    the weights that are in no pretrained model: queries and projectors
    florence/ …          the pretrained parts with the trained weights, each an ordinary pretrained
                         folder (config, safetensors, tokenizer)

Every `from_pretrained` of this package opens it like any checkpoint. transformers and diffusers
open its base models without this package.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import cached_file

from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints import loading
from vlv_model.checkpoints.digests import fingerprint, fingerprint_parts
from vlv_model.checkpoints.files import StageName, new_folder, write_checkpoint_files
from vlv_model.checkpoints.layouts import INDEX_FILE, SD, base_parts, layout_of
from vlv_model.checkpoints.parts import ExportedParts
from vlv_model.checkpoints.sources import DIFFUSION_PARTS, Source, part_source
from vlv_model.config import ModelConfig, Precision
from vlv_model.precision import cast

MAX_SHARD_SIZE = "5GB"
# Copied unchanged; a repository has some of them.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def open_model(
    config: ModelConfig, checkpoint: Path | None, stage: StageName
) -> VLVAutoEncoder | VLVCaptioner:
    """The model of a stage with a checkpoint's weights, or (None) its base models' weights only."""
    if stage == "stage2":
        untrained = checkpoint is None
        return VLVCaptioner.from_pretrained(config, checkpoint, for_training=untrained)
    return VLVAutoEncoder.from_pretrained(config, checkpoint)


def export_model(
    folder: str | os.PathLike[str],
    model: VLVAutoEncoder | VLVCaptioner,
    config: ModelConfig,
    about: Mapping[str, Any],
    *,
    precision: Precision = "float32",
    parts: ExportedParts = "needed",
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a model with all its base models into a new folder, atomically.

    `config` is what `model` was built from. `about` holds the fields of CheckpointInfo that do not
    follow from the weights or base models. All weights are written in `precision`; bfloat16 also
    rounds `model` in place. `parts="all"` adds the unchanged base models of the other stage: the
    language model for an auto-encoder, VAE and UNet for a captioner. `texts` are further files by
    name (the model card). Raises CheckpointError when `folder` exists, ModelError for a part that
    cannot be read.
    """
    cast(model, precision)
    modules = _modules(model)
    if parts == "all":
        modules |= _other_modules(config, modules)
    with new_folder(folder) as work:
        for part, module in modules.items():
            with loading.quietly():
                module.save_pretrained(work / part, max_shard_size=MAX_SHARD_SIZE)
        for part in _with_published_files(modules):
            _copy_files(config, part, work / part)
        _write_index(config, work)
        exported_config = _exported_config(config, work)
        fingerprints = {part: fingerprint(work / part) for part in modules}
        # Base models that are not exported keep their recorded fingerprints.
        fingerprints = {**about.get("base_models", {}), **fingerprints}
        weights = {
            name: tensor.detach().contiguous()
            for name, tensor in model.named_parameters()
            if any(name == part or name.startswith(f"{part}.") for part in model.new_parts)
        }
        about = {**about, "model": exported_config, "base_models": fingerprints, "parent": None}
        write_checkpoint_files(work, weights, about)
        for name, text in (texts or {}).items():
            (work / name).write_text(text, encoding="utf-8")
    return Path(folder).absolute()


def sources_of(config: ModelConfig, stage: StageName) -> dict[str, dict[str, str]]:
    """The source of each base model, by part: its hub id or folder name, and its fingerprint."""
    fingerprints = fingerprint_parts(config, base_parts(stage, config))
    return {
        part: {"source": _public_name(part_source(config, part)), "fingerprint": digest}
        for part, digest in fingerprints.items()
    }


def _modules(model: VLVAutoEncoder | VLVCaptioner) -> dict[str, Any]:
    """The pretrained parts of a model, by part: those with a `save_pretrained`."""
    modules: dict[str, Any] = {
        "florence": model.encoder.florence,
        **model.text_encoder.pretrained_parts,
    }
    if isinstance(model, VLVCaptioner):
        modules["language_model"] = model.language_model
    else:
        modules |= model.diffusion_decoder.pretrained_parts
    return modules


def _other_modules(config: ModelConfig, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    if "language_model" in modules:
        return loading.load_decoder(config).pretrained_parts
    return {"language_model": loading.load_language_model(config)}


def _with_published_files(modules: Mapping[str, nn.Module]) -> list[str]:
    """Parts with files that are copied unchanged."""
    parts = ["florence", "tokenizer"]
    parts += ["tokenizer_2"] if "text_encoder_2" in modules else []
    parts += ["language_model"] if "language_model" in modules else []
    parts += ["scheduler"] if "vae" in modules else []
    return parts


def _copy_files(config: ModelConfig, part: str, target: Path) -> None:
    source = part_source(config, part)
    names = ("scheduler_config.json",) if part == "scheduler" else _TOKENIZER_FILES
    target.mkdir(exist_ok=True)
    for name in names:
        file = cached_file(
            source.name,
            name,
            **source.load_kwargs,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None:
            shutil.copyfile(file, target / name)


def _write_index(config: ModelConfig, work: Path) -> None:
    """Say which decoder the parts are of, where their own configurations do not.

    A hub id says it. Stable Diffusion 2.1 is what a folder without it is.
    """
    layout = layout_of(config)
    if layout != SD and Path(config.diffusion).is_absolute():
        (work / "diffusion").mkdir()
        index = {"_class_name": f"{layout.pipeline}Pipeline"}
        text = json.dumps(index, indent=2) + "\n"
        (work / "diffusion" / INDEX_FILE).write_text(text, encoding="utf-8")


def _exported_config(config: ModelConfig, work: Path) -> ModelConfig:
    """`config` with exported parts named by their subfolders.

    Other parts keep their hub id. A local folder means nothing on another machine: it is replaced by
    the part's subfolder, so opening the part says what is missing.
    """
    exported = {p.name for p in work.iterdir()}
    update: dict[str, str | None] = {
        part: part if part in exported else None for part in DIFFUSION_PARTS
    }
    for part in ("florence", "diffusion", "language_model"):
        source = getattr(config, part)
        update[part] = part if part in exported or Path(source).is_absolute() else source
    return config.model_copy(update=update)


def _public_name(source: Source) -> str:
    """The source without the path of a local folder."""
    location = source.location
    public = Path(location.name) if isinstance(location, Path) else location
    return str(Source(public, source.subfolder))
