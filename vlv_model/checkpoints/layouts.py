"""Which diffusion model a folder holds, and the parts that it has, named as in diffusers.

Three decoders are known: Stable Diffusion 2.1 (one CLIP text encoder, UNet), SDXL (two, UNet) and
SD 3 / 3.5 (two, transformer). No setting says which: the files do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from vlv_model.checkpoints.hub import HubId
from vlv_model.checkpoints.published import BY_REPO
from vlv_model.checkpoints.sources import Source, part_source
from vlv_model.config import ModelConfig
from vlv_model.errors import ModelError, one_line

INDEX_FILE = "model_index.json"
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Layout:
    """The parts of a diffusion model; the first of `samplers` is the default."""

    name: Literal["sd", "sdxl", "sd3"]
    pipeline: str  # the beginning of model_index.json's _class_name
    denoiser: Literal["unet", "transformer"]
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    samplers: tuple[str, ...]


SD = Layout("sd", "StableDiffusion", "unet", ("text_encoder",), ("tokenizer",), ("ddpm", "ddim"))
_PAIR = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
SDXL = Layout("sdxl", "StableDiffusionXL", "unet", *_PAIR, ("ddpm", "ddim"))
SD3 = Layout("sd3", "StableDiffusion3", "transformer", *_PAIR, ("euler",))


def layout_of(config: ModelConfig, *, local: bool = False) -> Layout:
    """The layout of a model's diffusion decoder; `local`: without asking the hub.

    Decided by a `transformer` or `unet` that is set, else by the files of `diffusion`
    (model_index.json, else its transformer's or UNet's configuration), else by the text encoders
    that are set: an exported captioner has nothing else. Stable Diffusion 2.1 where nothing tells.
    Raises ModelError for a pipeline of another kind.
    """
    if config.transformer is not None:
        return SD3
    if config.unet is not None:
        return _of_unet(_json(config, "unet", "config.json", local))
    if found := _of_folder(config, local):
        return found
    if config.text_encoder_2 is not None:
        names = _json(config, "text_encoder", "config.json", local).get("architectures") or []
        return SD3 if "CLIPTextModelWithProjection" in names else SDXL
    return SD


def base_parts(stage: str, config: ModelConfig, *, local: bool = False) -> tuple[str, ...]:
    """The pretrained parts with weights that a stage's model is built from."""
    layout = layout_of(config, local=local)
    if stage == "stage2":
        return ("florence", *layout.text_encoders, "language_model")
    return ("florence", *layout.text_encoders, layout.denoiser, "vae")


def read_parts(stage: str, config: ModelConfig, *, local: bool = False) -> tuple[str, ...]:
    """All pretrained parts that `from_pretrained` of a stage's model reads."""
    layout = layout_of(config, local=local)
    schedule = () if stage == "stage2" else ("scheduler",)
    return (*base_parts(stage, config, local=local), *layout.tokenizers, *schedule)


def _of_folder(config: ModelConfig, local: bool) -> Layout | None:
    published = BY_REPO.get(config.diffusion.partition("@")[0], {})
    if published and not Path(config.diffusion).is_dir():
        return SD3 if "transformer" in published else _of_unet(published.get("unet", {}))
    name = _json(config, "", INDEX_FILE, local).get("_class_name")
    if name is None:
        if _json(config, "transformer", "config.json", local):
            return SD3
        unet = _json(config, "unet", "config.json", local)
        return _of_unet(unet) if unet else None
    for layout in (SDXL, SD3):
        if str(name).startswith(layout.pipeline):
            return layout
    if str(name).startswith(SD.pipeline):
        return SD
    raise ModelError(
        f"'{config.diffusion}' is a {name}, expected StableDiffusionPipeline (2.1), "
        "StableDiffusionXLPipeline or StableDiffusion3Pipeline: set model.diffusion to one of these"
    )


def _of_unet(content: Mapping[str, Any]) -> Layout:
    return SDXL if content.get("addition_embed_type") == "text_time" else SD


def _json(config: ModelConfig, part: str, name: str, local: bool) -> dict[str, Any]:
    """The JSON object in a part's file; empty where there is none."""
    try:
        source = part_source(config, part) if part else _root(config)
    except ModelError:  # loading the part reports that
        return {}
    folder = source.folder()
    if folder is not None and (file := folder / name).is_file():
        return _parsed(file)
    if source.repo is None or local:
        return {}
    path = _downloaded(source, name)
    return {} if path is None else _parsed(Path(path))


def _root(config: ModelConfig) -> Source:
    if Path(config.diffusion).is_dir():
        return Source(Path(config.diffusion))
    if hub_id := HubId.parse(config.diffusion):
        return Source(hub_id)
    raise ModelError(f"there is no folder '{config.diffusion}'")


@lru_cache(maxsize=32)
def _downloaded(source: Source, name: str) -> str | None:
    from transformers.utils import cached_file  # slow to import

    return cached_file(
        source.name,
        name,
        **source.load_kwargs,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _parsed(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ModelError(f"cannot read '{file}': {one_line(problem)}") from problem
    return content if isinstance(content, dict) else {}
