"""The results of a demo: its report, and a summary on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.demo.page import DemoReport, write_report
from pipelines.demo.proof import FROM_CAPTION
from pipelines.report.gallery import GalleryItem
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import parquet_files
from pipelines.tiny_world import scenes
from pipelines.training.metrics import read_metrics

SHOWN = 24  # images in the gallery
PROOF = ("captions", "control", "reconstruction", "denoising")


def write_demo_report(folder: Path, summary: dict[str, Any]) -> None:
    """Write `report.html` from the demo's tables, its runs and its summary."""
    photos = summary["photos"]
    notes = []
    if photos:
        notes.append(
            f"The images are photographs from {photos}. The tiny models know only drawn scenes of 64 "
            "pixels: all jobs run, but the results say nothing about quality."
        )
    proof = None if photos else {name: summary[name] for name in (*PROOF, "stage1")}
    report = DemoReport(
        title="VLV on Ray: demo" + (" on photographs" if photos else ""),
        notes=notes,
        proof=proof,
        ingest=summary["ingest"],
        stages={stage: read_metrics(folder / stage) for stage in ("stage1", "stage2")},
        recaption=summary["recaption"],
        reconstruct=summary["reconstruct"],
        gallery=_gallery(folder, is_world=not photos),
        seconds=summary["seconds"],
        versions=summary["versions"],
    )
    write_report(folder / "report.html", report)


def _gallery(folder: Path, is_world: bool) -> list[GalleryItem]:
    """The first reconstructions by key, with generated and target captions."""

    def rows(table: str, *columns: str) -> dict[int, dict[str, Any]]:
        files = parquet_files(str(folder / table))
        return {row["key"]: row for row in read_rows(files, ["key", *columns])}

    pictures, captions = rows("reconstructions", "image"), rows("captions", "caption", "status")
    originals = rows("test_images" if is_world else "images", "image", "url")
    ceiling = rows(FROM_CAPTION, "image") if is_world else {}
    teacher = folder / "world" / ("test/teacher.parquet" if is_world else "teacher.parquet")
    targets = {
        row["url"]: row["caption"]
        for row in read_rows(parquet_files(str(teacher)), ["url", "caption"])
    }
    items = []
    for key in sorted(pictures)[:SHOWN]:
        target = targets.get(originals[key]["url"])
        truth = scenes.parse(target or "")
        items.append(
            GalleryItem(
                key=key,
                original=originals[key]["image"]["bytes"],
                reconstruction=_bytes(pictures[key]),
                from_caption=_bytes(ceiling.get(key, {})),
                caption=captions[key]["caption"],
                target=target,
                held_out=truth is not None and scenes.is_held_out(truth),
                status=captions[key]["status"],
            )
        )
    return items


def _bytes(row: dict[str, Any]) -> bytes | None:
    return (row.get("image") or {}).get("bytes")


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Print the results."""
    ingested, captioned = summary["ingest"], summary["recaption"]
    print(
        f"\ningest      {ingested.get('ok', 0)} of {sum(ingested.values())} URLs are images, the "
        "other rows have the reason"
    )
    for stage in ("stage1", "stage2"):
        losses = summary[stage]
        start = ", from shipped weights" if losses.get("warm_start") else ""
        change = f"{losses['loss_before']:.4f} → {losses['loss_after']:.4f}"
        print(f"{stage}      held-out loss {change} in {losses['steps']} steps{start}")
    print(f"recaption   {captioned.get('ok', 0)} of {sum(captioned.values())} images")
    if "captions" in summary:
        captions, control = summary["captions"], summary["control"]
        print(
            f"captions    {captions['exact_match']:.1%} exactly right on unseen scenes, "
            f"{captions['exact_match_held_out_combinations']:.1%} on held-out combinations "
            f"(without stage 1: {control['exact_match']:.1%} and "
            f"{control['exact_match_held_out_combinations']:.1%})"
        )
        pictures, denoising = summary["reconstruction"], summary["denoising"]
        print(
            f"pictures    {pictures['attributes']:.1%} of attributes are in the reconstruction "
            f"(from the true caption {pictures['ceiling']:.1%}, from a wrong one "
            f"{pictures['floor']:.1%})"
        )
        print(
            f"denoising   {denoising['gap_closed']:.1%} of the gap between no caption "
            f"({denoising['no_caption']:.4f}) and the true one "
            f"({denoising['true_caption']:.4f}) is closed"
        )
    print(f"time        {sum(summary['seconds'].values()):.0f} s")
    print(f"summary     {folder / 'summary.json'}")
    print(f"report      {folder / 'report.html'}")
