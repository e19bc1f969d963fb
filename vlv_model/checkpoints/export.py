"""A trained model as one folder that stands alone: a checkpoint upon base models of its own.

    checkpoint.json      the checkpoint's, with paths relative to the folder, and `origin`
    model.safetensors    what no pretrained class has: queries and projectors
    florence/ …          the pretrained parts with the trained weights in them, each an ordinary
                         pretrained folder (config, safetensors, tokenizer)

It is opened as any checkpoint, by every `from_pretrained` of this package, and its base models by
transformers and diffusers alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers.utils import cached_file

from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints import loading
from vlv_model.checkpoints.files import StageName, new_folder, put_checkpoint
from vlv_model.checkpoints.fingerprint import fingerprint, fingerprint_parts
from vlv_model.checkpoints.sources import Source, part_source
from vlv_model.config import ModelConfig, Precision
from vlv_model.precision import cast

Parts = Literal["needed", "all"]

MAX_SHARD_SIZE = "5GB"
_KINDS: dict[StageName, type[VLVAutoEncoder | VLVCaptioner]] = {
    "stage1": VLVAutoEncoder,
    "stage2": VLVCaptioner,
}
# Beside weights and configuration; a repository has some of them. Copied as they were published.
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
    """The model whose weights a checkpoint of that stage holds; None: its base models alone."""
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
    parts: Parts = "needed",
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a model with all its base models into a new folder, whole or not at all.

    `config` is what `model` was built from. `about` holds the fields of CheckpointInfo that
    neither the weights nor the base models tell. `precision` is that of all weights; bfloat16
    rounds `model` itself too. With `parts="all"` the base models of the other stage come along,
    as they were published: the language model with an auto-encoder, VAE and UNet with a captioner.
    `texts` are further files by name (the model card). Raises CheckpointError when `folder`
    exists, ModelError for a part that cannot be read.
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
        own = _own_config(config, work)
        fingerprints = {part: fingerprint(work / part) for part in modules}
        # Of base models that stay behind it is still known which they were.
        fingerprints = {**about.get("base_models", {}), **fingerprints}
        weights = {
            name: tensor.detach().contiguous()
            for name, tensor in model.named_parameters()
            if any(name == part or name.startswith(f"{part}.") for part in model.new_parts)
        }
        put_checkpoint(
            work, weights, {**about, "model": own, "base_models": fingerprints, "parent": None}
        )
        for name, text in (texts or {}).items():
            (work / name).write_text(text, encoding="utf-8")
    return Path(folder).absolute()


def parts_read(stage: StageName, parts: Parts) -> tuple[str, ...]:
    """The pretrained parts that an export of that stage reads."""
    if parts == "all":
        return (*VLVAutoEncoder.read_parts, "language_model")
    return _KINDS[stage].read_parts


def sources_of(config: ModelConfig, stage: StageName) -> dict[str, dict[str, str]]:
    """Where each base model came from, by part: its hub id or folder's name, and fingerprint."""
    found = fingerprint_parts(config, _KINDS[stage].base_parts)
    return {
        part: {"source": _public_name(part_source(config, part)), "fingerprint": digest}
        for part, digest in found.items()
    }


def _modules(model: VLVAutoEncoder | VLVCaptioner) -> dict[str, Any]:
    """The pretrained parts of a model, by part: what their own classes can save and open."""
    modules: dict[str, Any] = {
        "florence": model.encoder.florence,
        "text_encoder": model.text_encoder.clip,
    }
    if isinstance(model, VLVCaptioner):
        modules["language_model"] = model.language_model
    else:
        modules["vae"] = model.diffusion_decoder.vae
        modules["unet"] = model.diffusion_decoder.unet
    return modules


def _other_modules(config: ModelConfig, there: Mapping[str, nn.Module]) -> dict[str, Any]:
    if "language_model" in there:
        vae, unet, _ = loading.load_diffusion(config)
        return {"vae": vae, "unet": unet}
    return {"language_model": loading.load_language_model(config)}


def _with_published_files(modules: Mapping[str, nn.Module]) -> list[str]:
    """Parts that get files as they were published."""
    parts = ["florence", "tokenizer"]
    parts += ["language_model"] if "language_model" in modules else []
    parts += ["scheduler"] if "unet" in modules else []
    return parts


def _copy_files(config: ModelConfig, part: str, target: Path) -> None:
    source = part_source(config, part)
    names = ("scheduler_config.json",) if part == "scheduler" else _TOKENIZER_FILES
    target.mkdir(exist_ok=True)
    for name in names:
        found = cached_file(
            source.name,
            name,
            **source.where,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            shutil.copyfile(found, target / name)


def _own_config(config: ModelConfig, work: Path) -> ModelConfig:
    """`config` with the parts that are in the folder named by their place in it.

    What was left out keeps its hub id. A folder of this machine would mean nothing elsewhere: it
    becomes the place where the part would lie, so that opening it says what is missing.
    """
    inside = {p.name for p in work.iterdir()}
    named = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    places: dict[str, str | None] = {part: part if part in inside else None for part in named}
    for part in ("florence", "diffusion", "language_model"):
        source = getattr(config, part)
        places[part] = part if part in inside or Path(source).is_absolute() else source
    return config.model_copy(update=places)


def _public_name(source: Source) -> str:
    place = Path(source.place.name) if isinstance(source.place, Path) else source.place
    return str(Source(place, source.subfolder))
