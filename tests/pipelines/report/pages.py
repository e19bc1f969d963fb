"""A strict HTML parser, a browser, and reports."""

from __future__ import annotations

import html
import io
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.demo.page import DemoReport
from pipelines.recaption.page import CaptionReport, CaptionSample, HealthLine
from pipelines.report.gallery import GalleryItem
from pipelines.report.html import environment
from pipelines.tiny_world import scenes

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Open a page in a headless browser with some options; returns its output."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        looked_for = ", ".join(BROWSERS)
        pytest.skip(f"no browser on PATH (looked for {looked_for}): apt-get install chromium")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    quiet += ["--disable-component-update", "--disable-gpu", "--hide-scrollbars"]
    if os.geteuid() == 0:  # Chromium's sandbox refuses to run as root, as in a container
        quiet.append("--no-sandbox")

    def open_page(page: Path, *options: str) -> str:
        command = [browser, "--headless", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
        command += [*options, page.as_uri()]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=120
        ).stdout

    return open_page


@pytest.fixture
def overflowing(browse: Callable[..., str], tmp_path: Path) -> Callable[..., list[str]]:
    """The elements of pages that stick out of the window or of their tile, at widths in pixels."""

    def find(pages: Sequence[str], widths: Sequence[int]) -> list[str]:
        frames = []
        for width, page in product(widths, pages):
            page = re.sub(r"<meta http-equiv[^>]*>", "", page)  # its policy forbids the script
            inside = html.escape(page.replace("</body>", f"<script>{_OVERFLOWING}</script></body>"))
            frames.append(f'<iframe style="width:{width}px" srcdoc="{inside}"></iframe>')
        whole = f"<body><script>{_COLLECTED}</script>{''.join(frames)}"
        (tmp_path / "frames.html").write_text(whole)
        shown = browse(tmp_path / "frames.html", "--window-size=1400,1000", "--dump-dom")
        assert shown.count("<li>done</li>") == len(frames)
        return [html.unescape(found) for found in re.findall("<li>too wide: (.*?)</li>", shown)]

    return find


_COLLECTED = """addEventListener("message", (message) => {
  const item = document.createElement("li");
  item.textContent = message.data;
  document.body.append(item);
});"""
_OVERFLOWING = """addEventListener("load", () => {
  const scrolls = (element) => element && (
    ["auto", "scroll"].includes(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest("svg") || scrolls(element)) continue;
    const tile = element.closest(".cards li, .gallery li, .chart") ?? document.documentElement;
    const end = element.getBoundingClientRect().left + element.scrollWidth;
    if (end > tile.getBoundingClientRect().right + 1)
      parent.postMessage(`too wide: ${innerWidth} px, ${element.tagName} ${element.textContent.trim().slice(0, 40)}`, "*");
  }
  parent.postMessage("done", "*");
});"""


def macro(template: str, name: str) -> Callable[..., str]:
    """A macro of a template in `pipelines/report`."""
    found: Callable[..., str] = getattr(
        environment().get_template(f"report/{template}.html.jinja").module, name
    )
    return found


VOID = {"img", "input", "link", "meta"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    def all(self, name: str, of_class: str | None = None) -> list[Element]:
        """Every element below that has the name, and the class where one is given."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                classes = (child.attributes.get("class") or "").split()
                if child.name == name and (of_class is None or of_class in classes):
                    found.append(child)
                found += child.all(name, of_class)
        return found

    @property
    def text(self) -> str:
        """What is read, with one blank for any white space."""
        parts = (c if isinstance(c, str) else c.text for c in self.children)
        return " ".join(" ".join(parts).split())


class StrictReader(HTMLParser):
    """Build the tree; fails if an element is not closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("document", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> repeats an attribute"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


@pytest.fixture(scope="session")
def parse() -> Callable[[str], Element]:
    def read(document: str) -> Element:
        reader = StrictReader()
        reader.feed(document)
        reader.close()
        assert reader.open == [reader.root], f"<{reader.open[-1].name}> is never closed"
        return reader.root

    return read


def training_events(before: float, after: float, steps: int = 300) -> list[dict]:
    def loss(step: int) -> float:
        return after + (before - after) * math.exp(-step / 60)

    events: list[dict] = [{"event": "eval", "step": 0, "heldout_loss": before, "rows": 64}]
    for step in range(1, steps + 1):
        noise = 1 + 0.1 * math.sin(12.9898 * step)
        events.append({"event": "step", "step": step, "loss": loss(step) * noise})
        if step % 100 == 0:
            value = after if step == steps else loss(step)
            events.append({"event": "eval", "step": step, "heldout_loss": value, "rows": 64})
            events.append({"event": "checkpoint", "step": step})
    return events


def picture(scene: scenes.Scene, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    scenes.draw(scene, seed=1).save(buffer, kind)
    return buffer.getvalue()


def attributes(*shares: float) -> dict[str, float]:
    return dict(zip(("size", "colour", "shape", "relation", "background"), shares, strict=True))


@pytest.fixture(scope="session")
def proof() -> dict[str, Any]:
    """Scores as in the demo's summary.json, all different."""
    return {
        "captions": {
            "exact_match": 0.97,
            "exact_match_held_out_combinations": 0.88,
            "attributes": attributes(0.995, 0.99, 0.985, 1.0, 0.994),
            "attributes_held_out_combinations": attributes(0.981, 0.96, 0.931, 0.998, 0.993),
            "scenes": 201,
            "scenes_held_out_combinations": 199,
        },
        "control": {
            "exact_match": 0.02,
            "exact_match_held_out_combinations": 0.0,
            "attributes": attributes(0.61, 0.42, 0.38, 0.72, 0.883),
            "attributes_held_out_combinations": attributes(0.6, 0.31, 0.27, 0.7, 0.87),
            "scenes": 201,
            "scenes_held_out_combinations": 199,
        },
        "reconstruction": {
            "attributes": 0.93,
            "ceiling": 0.95,
            "floor": 0.35,
            "pictures": 128,
            "by_attribute": {
                "reconstruction": attributes(0.956, 0.94, 0.884, 0.97, 0.91),
                "ceiling": attributes(0.973, 0.951, 0.9, 0.992, 0.946),
                "floor": attributes(0.5, 0.17, 0.25, 0.51, 0.33),
            },
        },
        "denoising": {
            "true_caption": 0.11,
            "encoder": 0.14,
            "no_caption": 0.31,
            "wrong_caption": 0.6,
            "gap_closed": 0.85,
        },
        "stage1": {"warm_start": True, "steps": 1060, "columns_read": ["key", "image"]},
    }


@pytest.fixture(scope="session")
def report() -> DemoReport:
    shown = scenes.sample(0, 4, "test")
    large, small = (replace(shown[0], first=replace(shown[0].first, size=s)) for s in scenes.SIZES)
    shown[0], wrong = large, scenes.caption(small)
    items = [
        GalleryItem(i, picture(s), picture(s, "JPEG"), scenes.caption(s), scenes.caption(s), "ok")
        for i, s in enumerate(shown)
    ]
    items.append(GalleryItem(99, picture(shown[0]), None, wrong, scenes.caption(shown[0]), "ok"))
    return DemoReport(
        title="Demo of the tiny world",
        notes=["These figures prove nothing about quality."],
        ingest={
            "ok": 12960,
            "decode:truncated": 8,
            "download:http_404": 12,
            "download:timeout": 5,
            "filtered:short_side": 3,
        },
        stages={"stage1": training_events(1.031, 0.7421), "stage2": training_events(5.548, 0.4119)},
        recaption={"ok": 95, "decode:corrupt": 1},
        reconstruct={"ok": 16},
        gallery=items,
        seconds={"ingest": 14.3, "stage 1": 171.2, "stage 2": 3725.0},
        versions={"ray": "2.60.0", "torch": "2.13.0"},
    )


@pytest.fixture
def caption_report() -> CaptionReport:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(buffer, "PNG")
    seen = CaptionSample(1, "a/one.jpg", "A teal wall.", (), 3, buffer.getvalue())
    cut = CaptionSample(2, "a/two.jpg", "A wall and", ("truncated",), 3, buffer.getvalue())
    return CaptionReport(
        title="Captions of walls",
        model="0123456789abcdef",
        settings=[("generate.max_new_tokens", "300")],
        counts={"ok": 4321, "caption:failed": 21},
        captions=4321,
        health=[
            HealthLine("truncated", "cut", 117, 0.02),
            HealthLine("empty", "no word", 5, 0.01),
            HealthLine("duplicates", "repeated", 211),
        ],
        words={3: 4000, 40: 321},
        tokens={4: 4000, 300: 321},
        commonest=[(212, "A wall.")],
        gallery=[seen],
        unhealthy=[cut],
        searched=[replace(seen, image=None), replace(cut, image=None)],
    )
