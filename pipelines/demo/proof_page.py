"""The tables of the section "Does it work?" of the demo's report. Template: proof.html.jinja.

Scores are as in `summary.json`: `captions`, `control`, `reconstruction`, `denoising` and `stage1`. Shares
are from 0 to 1; None and non-finite values are shown as missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report.figures import count, known
from pipelines.tiny_world import scenes

Proof = Mapping[str, Any]

ATTRIBUTES = {
    "size": len(scenes.SIZES),
    "colour": len(scenes.COLOURS),
    "shape": len(scenes.SHAPES),
    "relation": len(scenes.RELATIONS),
    "background": len(scenes.BACKGROUNDS),
}
"""Attributes of a scene, with the number of their values."""

OURS, OTHER = "ours", "other"
"""Styles of a meter: filled for our result, hatched for a baseline."""

SOFT_HYPHEN = "\u00ad"  # allows a line break within a word


@dataclass(frozen=True)
class SharesTable:
    """Shares, each shown as a number above a meter."""

    columns: Sequence[tuple[str, str, str]]  # name, note, style of the meters
    rows: Sequence[tuple[str, str, Sequence[float | None]]]  # name, note, a share for each column
    caption: str = ""
    groups: Sequence[str] = ()  # headings, each above the same number of columns


def captions_table(proof: Proof) -> SharesTable:
    """Shares of right captions and right words, compared with the control."""
    kinds = {"": "unseen scenes", "_held_out_combinations": f"held-out combi{SOFT_HYPHEN}nations"}
    scores = [
        (proof[part], kind, look)
        for part, look in (("captions", OURS), ("control", OTHER))
        for kind in kinds
    ]
    exact = [figures[f"exact_match{kind}"] for figures, kind, _ in scores]
    return SharesTable(
        columns=[
            (kinds[kind], f"{count(figures[f'scenes{kind}'])} scenes", look)
            for figures, kind, look in scores
        ],
        rows=[
            ("exact match", "every word", exact),
            *(
                (name, f"one of {n}", [f[f"attributes{kind}"].get(name) for f, kind, _ in scores])
                for name, n in ATTRIBUTES.items()
            ),
        ],
        caption="Captions: how often every word is right, and the words of each kind",
        groups=["with stage 1", "control: stage 1 skipped"],
    )


def reconstruction_table(proof: Proof) -> SharesTable:
    """Shares of attributes that a judge reads in the pictures."""
    figures = proof["reconstruction"]
    shares = [figures["by_attribute"][name] for name in ("floor", "reconstruction", "ceiling")]
    overall = [figures[name] for name in ("floor", "attributes", "ceiling")]
    return SharesTable(
        columns=[
            ("floor", "wrong caption", OTHER),
            ("ours", "embeddings", OURS),
            ("ceiling", "true caption", OTHER),
        ],
        rows=[
            ("all", "mean of the five", overall),
            *((name, "", [share.get(name) for share in shares]) for name in ATTRIBUTES),
        ],
    )


def denoising_bars(proof: Proof) -> list[tuple[str, str, str, float | None, float | None]]:
    """Name, note, style, loss, and the loss as a share of the largest, of each condition."""
    conditions = (
        ("true caption", "in words", OTHER, "true_caption"),
        ("encoder", "ours: embeddings", OURS, "encoder"),
        ("no caption", "the empty text", OTHER, "no_caption"),
    )
    losses = {key: proof["denoising"][key] for *_, key in conditions}
    longest = max(filter(known, losses.values()), default=0.0)
    return [
        (
            name,
            note,
            look,
            losses[key],
            losses[key] / longest if longest and known(losses[key]) else None,
        )
        for name, note, look, key in conditions
    ]


def saw_pictures_only(proof: Proof) -> bool:
    """Whether stage 1 read images and no captions."""
    columns = set(proof["stage1"]["columns_read"])
    return "image" in columns and columns <= {"key", "image"}
