"""The model card of an exported folder: a README.md with the hub's YAML header."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.images.markdown import card, table
from vlv_model.checkpoints.fingerprint import short
from vlv_model.checkpoints.sources import part_source
from vlv_model.config import ModelConfig

_USE = {
    "stage2": """\
from PIL import Image, ImageOps
from vlv_model import VLVCaptioner
from vlv_model.preprocessing import square_image

captioner = VLVCaptioner.from_pretrained("{name}")
image = {image}
square = square_image(image, {arguments})  # uint8 [3 {size} {size}]
captioner.generate(square[None])[0].text""",
    "stage1": """\
import torch
from PIL import Image, ImageOps
from vlv_model import VLVAutoEncoder
from vlv_model.preprocessing import square_image

autoencoder = VLVAutoEncoder.from_pretrained("{name}")
image = {image}
square = square_image(image, {arguments})  # uint8 [3 {size} {size}]
autoencoder.reconstruct(square[None], [torch.Generator()])  # uint8 [1 3 {size} {size}]""",
}
_COMMAND = {
    "stage2": "python jobs/caption.py photo.jpg --model {name}",
    "stage1": "python jobs/reconstruct.py data.input=IMAGES model.path={name} data.output=PICTURES",
}
_DESCRIPTION = {
    "stage2": "A captioner: the VLV encoder, the frozen text encoder of a diffusion model, a "
    "projector, and a language model that decodes the projected embeddings into a caption.",
    "stage1": "A VLV auto-encoder: an encoder that maps an image to {queries} embeddings, and the "
    "frozen diffusion model that reconstructs the image from them.",
}
_SETTINGS = ("learning_rate", "schedule", "steps", "global_batch_size", "precision", "zero_stage",
          "trainable", "lora", "max_caption_tokens", "seed")  # fmt: skip


def model_card(name: str, model: ModelConfig, about: Mapping[str, Any], licence: str) -> str:
    """The card as Markdown with a YAML header; `model` names the base models of the export.

    `about` is that of `export_model`, with its `origin`.
    """
    stage, origin = about["stage"], about["origin"]
    # The hub links only repositories; the table below also names local folders.
    sources = {part_source(model, part).repo for part in origin["base_models"]}
    header = {
        "license": licence,
        "pipeline_tag": "image-to-text" if stage == "stage2" else "image-to-image",
        "tags": ["vlv", "arxiv:2507.07104"],
        "base_model": sorted(repo for repo in sources if repo),
    }
    arguments, image = str(model.image_size), 'ImageOps.exif_transpose(Image.open("photo.jpg"))'
    if model.preprocess == "reference":
        arguments, image = f'{arguments}, "reference"', 'Image.open("photo.jpg")'
    blocks = [
        f"# {name}",
        _DESCRIPTION[stage].format(queries=model.num_queries)
        + " Vision-Language-Vision auto-encoder (arXiv 2507.07104), "
        + ("imported from its published implementation." if "reference" in origin else "trained."),
        "## Use",
        "```python\n"
        + _USE[stage].format(name=name, size=model.image_size, arguments=arguments, image=image)
        + "\n```",
        "```\n" + _COMMAND[stage].format(name=name) + "\n```",
        "## Base models",
        "Their licences apply in addition to this model's.",
        table(
            ("part", "from", "fingerprint before training"),
            [(p, e["source"], short(e["fingerprint"])) for p, e in origin["base_models"].items()],
        ),
        "## Training",
        *_training(origin),
        "`checkpoint.json` has all settings, the fingerprints of the parts in this folder, and the "
        f"digests of the source weights ({origin['made_of']['precision']} here).",
    ]
    return card(header, blocks)


def _training(origin: Mapping[str, Any]) -> list[str]:
    if "reference" in origin:
        step = origin["reference"]["step"]
        length = f"{step:,} steps" if step else "not recorded in the checkpoint"
        return [f"By the published implementation. Steps and data: {length}. See `import.json`."]
    trainings = origin["trainings"]
    rows = [("steps done", [f"{t['step']:,}" for t in trainings])]
    rows += [("rows seen, repeats counted", [f"{t['rows_seen']:,}" for t in trainings])]
    for key in _SETTINGS:
        values = [_cell(t["settings"].get("train", {}).get(key)) for t in trainings]
        if any(value is not None for value in values):
            rows.append((key, [value or "–" for value in values]))
    head = ("", *(t["stage"] for t in trainings))
    blocks = [table(head, [(label, *values) for label, values in rows])]
    run = origin["run"]
    if run.get("rows"):
        training, heldout = run["rows"]
        blocks.append(f"Data: {training:,} rows to train on, {heldout:,} held out.")
    if losses := run.get("heldout_loss"):
        steps = sorted(losses, key=int)
        ends = [f"{losses[s]:.4f} at step {int(s):,}" for s in dict.fromkeys((steps[0], steps[-1]))]
        blocks.append(f"Held-out loss: {', '.join(ends)}.")
    return blocks


def _cell(value: Any) -> str | None:
    """The text of a setting; None for LoRA without adapters."""
    if isinstance(value, Mapping):
        value = value["rank"] and ", ".join(f"{k} {v}" for k, v in value.items() if k != "targets")
        return value or None
    return None if value is None else str(value)
