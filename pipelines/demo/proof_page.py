"""The section "Does it work?" of the demo's report, for a reader who is new to the method.

All functions take the scores as in `summary.json`: `captions`, `control`, `reconstruction`, `denoising`
and `stage1`. Shares are from 0 to 1; None and non-finite values are shown as missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.report.charts import format_loss
from pipelines.report.html import MISSING, Card, Html, count, section, tag
from pipelines.report.shares import OTHER, OURS, gap, known, meter, share, shares_table
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

PICTURES_ONLY = frozenset(["key", "image"])  # columns of a training on images only

SOFT_HYPHEN = "\u00ad"  # allows a line break within a word


# ---------------------------------------------------------------------------------------- cards


def proof_cards(proof: Proof) -> list[Card]:
    """The four main scores."""
    ours, control = proof["captions"], proof["control"]
    pictures, losses = proof["reconstruction"], proof["denoising"]
    same, new = "exact_match", "exact_match_held_out_combinations"
    figures = [
        (
            "Exact match",
            share(ours[same]),
            f"captions right word for word on unseen scenes; control {share(control[same])}",
        ),
        (
            "Held-out combinations",
            share(ours[new]),
            "right word for word on colour–shape pairs never trained on; "
            f"control {share(control[new])}",
        ),
        (
            "Gap closed",
            gap(losses["gap_closed"]),
            "of the way from no caption to the true caption, in the decoder’s denoising loss",
        ),
        (
            "Reconstruction",
            share(pictures["attributes"]),
            "of attributes right in images from the embeddings; "
            f"ceiling, from the true caption, {share(pictures['ceiling'])}",
        ),
    ]
    return [Card(*figure, target="proof") for figure in figures]


# -------------------------------------------------------------------------------------- section


def proof_section(proof: Proof) -> Html:
    """The claim, with all scores."""
    charts = (_denoising(proof["denoising"]), _reconstruction(proof["reconstruction"]))
    return section(
        "proof",
        "Does it work?",
        _claim(proof),
        _captions(proof["captions"], proof["control"]),
        tag("div", *charts, class_="charts"),
        _start(proof["stage1"]),
    )


def _claim(proof: Proof) -> str:
    """Two sentences with the scores in them, so that they cannot claim more than was measured."""
    ours, control, stage1 = proof["captions"], proof["control"], proof["stage1"]
    saw = (
        "saw pictures only"
        if _pictures_only(stage1)
        else "did not see pictures only (its columns are named below)"
    )
    return (
        f"Stage 1 {saw}, and the captioner built on it is right word for word on "
        f"{share(ours['exact_match'])} of {count(ours['scenes'])} scenes, and on "
        f"{share(ours['exact_match_held_out_combinations'])} of "
        f"{count(ours['scenes_held_out_combinations'])} scenes with a combination of colour and "
        "shape, that no training ever showed. The control is the same stage 2 on an encoder that "
        f"skipped stage 1: it is right on {share(control['exact_match'])} and "
        f"{share(control['exact_match_held_out_combinations'])}."
    )


def _pictures_only(stage1: Proof) -> bool:
    columns = stage1["columns_read"]
    return "image" in columns and PICTURES_ONLY.issuperset(columns)


def _start(stage1: Proof) -> Html:
    steps = count(stage1["steps"])
    if stage1["warm_start"]:
        title = "Stage 1 was warm-started."
        words = (
            "It began from stage-1 weights that are shipped with the code, and this run trained "
            f"them for {steps} more steps: the figures above are of both trainings together."
        )
    else:
        title = "Stage 1 was trained in full."
        words = f"All {steps} steps were done in this run, from base models that skipped it."
    columns = Html(", ".join(tag("code", name) for name in stage1["columns_read"]))
    read = ("Of the training table it read these columns: ", columns, ".")
    return tag("p", tag("strong", title), f" {words} ", *read, class_="start")


# -------------------------------------------------------------------------------------- figures


def _captions(ours: Proof, control: Proof) -> Html:
    """Shares of right captions and right words, compared with the control."""
    kinds = [
        ("", "unseen scenes"),
        ("_held_out_combinations", f"held-out combi{SOFT_HYPHEN}nations"),
    ]
    columns = [
        (figures, kind, look)
        for figures, look in ((ours, OURS), (control, OTHER))
        for kind, _ in kinds
    ]
    rows = [("exact match", "every word", [f[f"exact_match{k}"] for f, k, _ in columns])]
    for name, choices in ATTRIBUTES.items():
        values = [figures[f"attributes{kind}"].get(name) for figures, kind, _ in columns]
        rows.append((name, f"one of {choices}", values))
    headings = [
        (heading, f"{count(figures[f'scenes{kind}'])} scenes")
        for figures in (ours, control)
        for kind, heading in kinds
    ]
    groups = ["with stage 1", "control: stage 1 skipped"]
    caption = "Captions: how often every word is right, and the words of each kind"
    return shares_table(caption, headings, rows, [look for _, _, look in columns], groups)


def _denoising(losses: Proof) -> Html:
    """Bars of the losses, and the closed share of the gap."""
    shown = {
        "true_caption": ("true caption", "in words", OTHER),
        "encoder": ("encoder", "ours: embeddings", OURS),
        "no_caption": ("no caption", "the empty text", OTHER),
    }
    longest = max((losses[name] for name in shown if known(losses[name])), default=0.0)
    rows = []
    for name, (label, note, look) in shown.items():
        loss = losses[name]
        length = loss / longest if known(loss) and longest > 0 else None
        cells = (tag("td", _loss(loss)), tag("td", meter(length, look), class_="length"))
        rows.append(tag("tr", tag("th", label, tag("small", note), scope="row"), *cells))
    lead = (
        "The frozen diffusion decoder removes noise from an image. Its loss is lower the more its "
        "condition tells about the image; shorter bars are better."
    )
    words = (
        f" The loss with the encoder lies {gap(losses['gap_closed'])} of the way from no caption "
        "to the true caption. With the caption of another scene it is "
        f"{_loss(losses['wrong_caption'])}."
    )
    closed = tag("strong", f"Gap closed: {gap(losses['gap_closed'])}.")
    return tag(
        "figure",
        tag("h3", "Denoising: what the encoder tells the decoder"),
        tag("p", lead, class_="lead"),
        tag("table", tag("tbody", *rows), class_="shares losses"),
        tag("figcaption", tag("p", closed, words)),
        class_="chart",
    )


def _loss(value: float | None) -> str:
    return format_loss(value) if known(value) else MISSING


def _reconstruction(figures: Proof) -> Html:
    columns = [("floor", OTHER), ("reconstruction", OURS), ("ceiling", OTHER)]
    overall = [figures["floor"], figures["attributes"], figures["ceiling"]]
    rows = [("all", "mean of the five", overall)]
    for name in ATTRIBUTES:
        rows.append((name, "", [figures["by_attribute"][c].get(name) for c, _ in columns]))
    headings = [("floor", "wrong caption"), ("ours", "embeddings"), ("ceiling", "true caption")]
    lead = (
        f"{count(figures['pictures'])} images are generated from the caption embeddings alone, and "
        "a judge without learned weights reads each attribute from their pixels."
    )
    return tag(
        "figure",
        tag("h3", "Reconstruction: what can be read back"),
        tag("p", lead, class_="lead"),
        shares_table(None, headings, rows, [look for _, look in columns]),
        tag(
            "figcaption",
            tag(
                "p",
                "The same decoder generates the ceiling from the true caption, and the floor from "
                "the caption of another scene.",
            ),
        ),
        class_="chart",
    )
