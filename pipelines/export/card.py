"""The model card of an exported folder: a README.md with the hub's YAML header."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.images.markdown import card
from vlv_model.checkpoints.digests import short
from vlv_model.checkpoints.sources import part_source
from vlv_model.config import ModelConfig

_SETTINGS = ("learning_rate", "schedule", "steps", "global_batch_size", "precision", "zero_stage",
          "trainable", "lora", "max_caption_tokens", "seed")  # fmt: skip


def model_card(name: str, model: ModelConfig, about: Mapping[str, Any], licence: str) -> str:
    """The card as Markdown with a YAML header; `model` names the base models of the export.

    `about` is that of `export_model`, with its `origin`.
    """
    from huggingface_hub import ModelCardData

    stage, origin = about["stage"], about["origin"]
    # The hub links only repositories; the table of base models also names local folders.
    sources = {part_source(model, part).repo for part in origin["base_models"]}
    header = ModelCardData(
        license=licence,
        pipeline_tag="image-to-text" if stage == "stage2" else "image-to-image",
        tags=["vlv", "arxiv:2507.07104"],
        base_model=sorted(repo for repo in sources if repo) or None,
    )
    return card(
        header,
        "export/card.md.jinja",
        name=name,
        stage=stage,
        model=model,
        reference=origin.get("reference"),
        parts=[(p, e["source"], short(e["fingerprint"])) for p, e in origin["base_models"].items()],
        precision=origin["made_of"]["precision"],
        **_training(origin),
    )


def _training(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of each training side by side, rows, and the losses of the first and last step."""
    trainings, run = origin.get("trainings", []), origin.get("run", {})
    rows = [("steps done", [f"{t['step']:,}" for t in trainings])]
    rows += [("rows seen, repeats counted", [f"{t['rows_seen']:,}" for t in trainings])]
    for key in _SETTINGS:
        values = [_cell(t["settings"].get("train", {}).get(key)) for t in trainings]
        if any(value is not None for value in values):
            rows.append((key, [value or "–" for value in values]))
    losses = run.get("heldout_loss") or {}
    steps = sorted(losses, key=int)
    return {
        "training_head": ("", *(t["stage"] for t in trainings)),
        "training": [(label, *values) for label, values in rows],
        "rows": run.get("rows"),
        "losses": [
            f"{losses[s]:.4f} at step {int(s):,}" for s in dict.fromkeys((*steps[:1], *steps[-1:]))
        ],
    }


def _cell(value: Any) -> str | None:
    """The text of a setting; None for LoRA without adapters."""
    if isinstance(value, Mapping):
        value = value["rank"] and ", ".join(f"{k} {v}" for k, v in value.items() if k != "targets")
        return value or None
    return None if value is None else str(value)
