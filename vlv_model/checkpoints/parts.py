"""Which pretrained parts a stage reads, and what their files have to be. Imports no model library.

So a job finds a wrong folder before it loads anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlv_model.checkpoints.digests import opened_files
from vlv_model.checkpoints.hub import why_unreachable
from vlv_model.checkpoints.layouts import read_parts
from vlv_model.checkpoints.published import BY_REPO
from vlv_model.checkpoints.sources import Source, part_source
from vlv_model.errors import ModelError, one_line

if TYPE_CHECKING:
    from vlv_model.config import ModelConfig

CONFIG_FILES = {"scheduler": "scheduler_config.json"}  # of a part, where it is not config.json

# What a part's config.json says of its class.
_KINDS = {
    "florence": ("model_type", "florence2"),
    "text_encoder": ("model_type", "clip_text_model"),
    "text_encoder_2": ("model_type", "clip_text_model"),
    "language_model": ("model_type", "qwen2"),
    "vae": ("_class_name", "AutoencoderKL"),
    "unet": ("_class_name", "UNet2DConditionModel"),
    "transformer": ("_class_name", "SD3Transformer2DModel"),
}
_CONVERTER = "src/transformers/models/florence2/convert_florence2_original_pytorch_to_hf.py"


ExportedParts = Literal["needed", "all"]
"""Base models that an export holds: those of its stage, or also those of the other one."""


def parts_exported(stage: str, parts: ExportedParts, model: ModelConfig) -> tuple[str, ...]:
    """The pretrained parts that an export of that stage reads."""
    everything = parts == "all"
    read = read_parts("stage1" if everything else stage, model)
    return (*read, "language_model") if everything else read


def check_kind(part: str, source: Source, content: Any) -> None:
    """Raise ModelError unless `content`, a part's config.json, is of the part's class."""
    # A class accepts another model's configuration, fills missing fields with defaults (Qwen2's are
    # a 7B model) and fails later, if at all, far from the cause.
    if part not in _KINDS:
        return
    if part == "florence":
        _reject_microsoft_layout(source, content)
    key, expected = _KINDS[part]
    found = content.get(key) if isinstance(content, dict) else None
    if found != expected:
        raise ModelError(
            f"{part}: config.json in '{source}' says {key} {found!r}, expected "
            f"{expected!r}: set the model's '{part}' to a model of that type"
        )


def check_parts(model: ModelConfig, parts: Iterable[str]) -> None:
    """Raise ModelError for a part whose files cannot be its model's, or cannot be downloaded.

    Reads the configurations and looks for the weights, of which it opens none.
    """
    unreachable = cache(why_unreachable)
    for part in parts:
        source = part_source(model, part)
        folder = source.folder()
        if part not in _KINDS:
            continue
        if folder is not None and (file := folder / "config.json").is_file():
            check_kind(part, source, _read(part, file))
        if folder is not None and opened_files(folder):
            continue
        if source.repo is None:
            raise ModelError(
                f"{part}: cannot load '{source}': it lacks config.json or safetensors weights: "
                "expected a pretrained folder"
            )
        if (problem := unreachable()) is not None:
            raise ModelError(
                f"{part}: '{source}' is not in the local cache of the hub, and the hub does not "
                f"answer ({one_line(problem)}): give a local folder"
            )


def find_config(part: str, source: Source) -> Mapping[str, Any] | None:
    """A part's configuration: in its folder, in the hub's cache, or as published; else None.

    Raises ModelError where it is no JSON, or of another class.
    """
    folder = source.folder()
    if folder is not None and (file := folder / CONFIG_FILES.get(part, "config.json")).is_file():
        content = _read(part, file)
        check_kind(part, source, content)
        return dict(content)
    return BY_REPO.get(source.repo or "", {}).get(source.subfolder)


def _read(part: str, file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelError(f"{part}: cannot read '{file}': {one_line(problem)}") from problem


def _reject_microsoft_layout(source: Source, content: Any) -> None:
    """Reject Florence-2 as remote code, whose tensors have other names than transformers' classes."""
    vision = content.get("vision_config") if isinstance(content, dict) else None
    if isinstance(vision, dict) and "dim_embed" in vision and "embed_dim" not in vision:
        raise ModelError(
            f"florence: '{source}' is in Microsoft's own layout, expected transformers' layout: set "
            "the model's florence to florence-community/Florence-2-large or -base, or convert it in "
            f"a clone of transformers: python {_CONVERTER} --hf_model_id {source.name} "
            "--pytorch_dump_folder_path FOLDER"
        )
