"""Where pretrained parts come from: a ModelConfig, a model folder or a checkpoint; strict loads.

Every load here is safetensors only (a pickle can run code), float32 (Qwen2.5 is published in
bfloat16, in which updates of 1e-5 round away) and complete: a tensor that the file lacks would
silently stay random, so it is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import enable_progress_bars
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Florence2Model,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from vlv_model.config import ModelConfig
from vlv_model.errors import CheckpointError, ModelError

CHECKPOINT_FILE = "checkpoint.json"
MODEL_FILE = "model.json"
DIFFUSION_PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Model = ModelConfig | str | os.PathLike[str]


def resolve_model(model: Model) -> tuple[ModelConfig, Path | None]:
    """The ModelConfig that `model` stands for, and the checkpoint folder if it is one.

    `model` is a ModelConfig, a folder with `model.json` (a ModelConfig whose paths are relative to
    that folder) or a folder with `checkpoint.json` (its `model` section, all paths absolute).
    Local folders come back absolute, hub ids as they are. Raises ModelError or CheckpointError.
    """
    if isinstance(model, ModelConfig):
        return _with_absolute_folders(model, Path.cwd()), None
    folder = Path(model)
    if (folder / CHECKPOINT_FILE).is_file():
        path = folder / CHECKPOINT_FILE
    elif (folder / MODEL_FILE).is_file():
        path = folder / MODEL_FILE
    else:
        raise ModelError(
            f"'{folder}' holds neither {CHECKPOINT_FILE} nor {MODEL_FILE}: give a checkpoint's "
            "folder, a model folder such as vlv_model.tiny writes, or a ModelConfig"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = ModelConfig.model_validate(
            content["model"] if path.name == CHECKPOINT_FILE else content
        )
    except (ValueError, KeyError, TypeError) as problem:
        error = CheckpointError if path.name == CHECKPOINT_FILE else ModelError
        raise error(f"'{path}' cannot be read as a model: {one_line(problem)}") from problem
    config = _with_absolute_folders(config, folder.resolve())
    return config, folder if path.name == CHECKPOINT_FILE else None


def resolve_checkpoint(
    model: Model, checkpoint: str | os.PathLike[str] | None
) -> tuple[ModelConfig, Path | None]:
    """`resolve_model`, with the checkpoint named apart or found in `model`, but not both."""
    config, found = resolve_model(model)
    if checkpoint is None:
        return config, found
    if found is not None and found.resolve() != Path(checkpoint).resolve():
        raise CheckpointError(
            f"two checkpoints: '{found}' as the model and '{checkpoint}': give one of them"
        )
    return config, Path(checkpoint)


def part_source(config: ModelConfig, part: str) -> tuple[str, str]:
    """Folder or hub id of a part, and the subfolder in it ("" for none).

    `part` is `florence`, `language_model`, `vae`, `unet`, `text_encoder`, `tokenizer` or
    `scheduler`. Raises ModelError when a local folder does not exist.
    """
    own: str | None = getattr(config, part)
    if own is not None:
        source, subfolder = own, ""
    else:
        source, subfolder = config.diffusion, part
    path = Path(source, subfolder)
    if not path.is_dir() and (Path(source).is_dir() or not _HUB_ID.fullmatch(source)):
        raise ModelError(
            f"{part}: there is no folder '{path}', and '{source}' is no hub id (owner/name): "
            f"set the model's '{part if own else 'diffusion'}' to a pretrained folder or hub id"
        )
    return source, subfolder


def load_florence(
    config: ModelConfig,
) -> tuple[Florence2Model, PreTrainedTokenizerBase]:
    """Florence-2 without its language-modelling head, and its tokenizer."""
    source, _ = part_source(config, "florence")
    model = _load_transformer(config, "florence", Florence2Model)
    tokenizer = _load("florence", source, lambda: AutoTokenizer.from_pretrained(source))
    _check_vocabulary("florence", source, tokenizer, model.config.text_config.vocab_size)
    return model, tokenizer


def load_text_encoder(config: ModelConfig) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The diffusion model's CLIP text encoder and tokenizer."""
    source, subfolder = part_source(config, "tokenizer")
    tokenizer = _load(
        "tokenizer",
        source,
        lambda: CLIPTokenizer.from_pretrained(source, subfolder=subfolder),
    )
    model = _load_transformer(config, "text_encoder", CLIPTextModel)
    _check_vocabulary("tokenizer", source, tokenizer, model.config.vocab_size)
    return model, tokenizer


def text_encoder_width(config: ModelConfig) -> int:
    """Width of the text encoder's embeddings, read from its configuration alone."""
    source, subfolder = part_source(config, "text_encoder")
    return _load(
        "text_encoder",
        source,
        lambda: CLIPTextConfig.from_pretrained(source, subfolder=subfolder).hidden_size,
    )


def load_diffusion(
    config: ModelConfig,
) -> tuple[AutoencoderKL, UNet2DConditionModel, DDPMScheduler]:
    """VAE, UNet and the noise schedule (whatever sampler was published with it)."""
    vae = _load_diffuser(config, "vae", AutoencoderKL)
    unet = _load_diffuser(config, "unet", UNet2DConditionModel)
    source, subfolder = part_source(config, "scheduler")
    scheduler_config = _load(
        "scheduler",
        source,
        lambda: DDPMScheduler.load_config(source, subfolder=subfolder),
    )
    return vae, unet, DDPMScheduler.from_config(scheduler_config)


def load_language_model(config: ModelConfig) -> Qwen2ForCausalLM:
    """The caption decoder."""
    return _load_transformer(config, "language_model", Qwen2ForCausalLM)


def load_caption_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The caption decoder's tokenizer alone: data workers need no weights.

    Read as published in tokenizer.json, through the generic class: the class that transformers
    infers from the model's type rebuilds the pipeline, with a normaliser that may not be there.
    """
    config, _ = resolve_model(model)
    source, _ = part_source(config, "language_model")
    return _load(
        "language_model",
        source,
        lambda: PreTrainedTokenizerFast.from_pretrained(source),
    )


def local_folder(source: str) -> Path | None:
    """The folder of a local or cached pretrained part; None for a hub id that is not cached."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def one_line(problem: BaseException) -> str:
    """The first line of an exception, or pydantic's first finding, short enough to be read."""
    if isinstance(problem, ValidationError):
        finding = problem.errors()[0]
        return f"{'.'.join(map(str, finding['loc']))}: {finding['msg']}"
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _with_absolute_folders(config: ModelConfig, base: Path) -> ModelConfig:
    def absolute(value: str) -> str:
        path = Path(base, value).expanduser()
        return str(path.resolve()) if path.exists() or not _HUB_ID.fullmatch(value) else value

    named = ("florence", "diffusion", *DIFFUSION_PARTS, "language_model")
    values = {name: getattr(config, name) for name in named}
    return config.model_copy(
        update={name: absolute(value) for name, value in values.items() if value is not None}
    )


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' bars over tensors; those of downloads from the hub stay."""
    were_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    if were_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            transformers_logging.enable_progress_bar()


def _load_transformer(config: ModelConfig, part: str, kind: Any) -> Any:
    source, subfolder = part_source(config, part)
    with without_bars():
        model, report = _load(
            part,
            source,
            lambda: kind.from_pretrained(
                source,
                subfolder=subfolder,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            ),
        )
    _check_complete(part, source, sorted(report["missing_keys"]))
    return model


def _load_diffuser(config: ModelConfig, part: str, kind: Any) -> Any:
    source, subfolder = part_source(config, part)
    model, report = _load(
        part,
        source,
        lambda: kind.from_pretrained(
            source,
            subfolder=subfolder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        ),
    )
    _check_complete(part, source, sorted(report["missing_keys"]))
    return model


def _check_complete(part: str, source: str, missing: list[str]) -> None:
    if missing:
        raise ModelError(
            f"{part}: '{source}' lacks {len(missing)} tensors of the model, such as "
            f"{', '.join(missing[:3])}: give weights in the layout of transformers' own classes"
        )


def _check_vocabulary(
    part: str, source: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    # Without its vocabulary files a tokenizer class may come up with a handful of special tokens
    # and no error. All tokenizers here are byte-level: at least one token for each byte.
    if not 256 <= len(tokenizer) <= vocab_size:
        raise ModelError(
            f"{part}: the tokenizer of '{source}' has {len(tokenizer)} tokens, expected 256 to the "
            f"model's {vocab_size}: are its vocabulary files there, and of the same model?"
        )


def _load(part: str, source: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    # What the two libraries raise for a missing file, an unreachable hub, a broken configuration,
    # and shapes that do not fit.
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as problem:
        where = "" if Path(source).is_dir() else ", which is no local folder, from the model hub"
        raise ModelError(
            f"{part}: cannot load '{source}'{where}; expected a pretrained folder with safetensors "
            f"weights or a reachable hub id: {one_line(problem)}"
        ) from problem
