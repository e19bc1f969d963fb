"""The report in a real browser, in light and dark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.demo.page import DemoReport, write_report
from pipelines.tiny_world import scenes


def screenshot(browse: Callable[..., str], page: Path, folder: Path, *options: str) -> np.ndarray:
    """Pixels [h w 3] of the page in a window of 1200 x 3200."""
    file = folder / "page.png"
    browse(page, *options, "--window-size=1200,3200", f"--screenshot={file}")
    return np.asarray(Image.open(file).convert("RGB"))


def pixels_of(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(image.astype(int) - colour).max(axis=-1) <= 3).sum())


@pytest.mark.parametrize(
    ("options", "ground", "ok"),
    [
        ((), (0xF6, 0xF6, 0xF3), (0x23, 0x81, 0x5D)),
        (("--force-dark-mode",), (0x14, 0x16, 0x1A), (0x4D, 0xBB, 0x8D)),
    ],
    ids=["light", "dark"],
)
def test_a_browser_shows_the_page(browse, report: DemoReport, tmp_path, options, ground, ok):
    write_report(tmp_path / "report.html", report)
    image = screenshot(browse, tmp_path / "report.html", tmp_path, *options)
    assert image.shape == (3200, 1200, 3)
    assert pixels_of(image[:20], ground) == 20 * 1200  # the theme's ground reaches the edges
    assert pixels_of(image, ok) > 3000  # the bar of the rows that are ok
    scene = scenes.parse(report.gallery[0].target or "")
    assert scene is not None
    # The first scene stands four to eight times in the gallery, enlarged more than twice.
    area = (np.asarray(scenes.draw(scene, 1)) == scenes.COLOURS[scene.first.colour]).all(-1).sum()
    assert pixels_of(image, scenes.COLOURS[scene.first.colour]) > 4 * area
