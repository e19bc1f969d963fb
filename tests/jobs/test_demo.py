"""`make demo`, small: killed in the middle, continued, looked at, run again."""

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipelines.storage import Table, parquet_files, read_rows
from pipelines.training.metrics import read_metrics
from tests.jobs.conftest import ROOT

pytestmark = pytest.mark.end_to_end

SCENES, BROKEN = 60, 8


def command(run_dir: Path) -> list[str]:
    settings = [f"run_dir={run_dir}", f"scenes={SCENES}", f"broken_urls={BROKEN}"]
    return [sys.executable, "jobs/demo.py", *settings, "stage1_steps=6", "stage2_steps=6"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo that was killed while stage 1 trained, and then run to its end."""
    run_dir = tmp_path_factory.mktemp("runs") / "demo"
    with open(run_dir.with_suffix(".log"), "w") as log:
        first = subprocess.Popen(command(run_dir), cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 500
        while not any(e["event"] == "step" for e in read_metrics(run_dir / "stage1")):
            assert first.poll() is None, run_dir.with_suffix(".log").read_text()
            assert time.monotonic() < deadline, run_dir.with_suffix(".log").read_text()
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    second = subprocess.run(command(run_dir), cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.rstrip().endswith(str(run_dir / "report.html"))
    return run_dir


def test_summary_holds_the_figures(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["ingest"]["ok"] == SCENES
    assert sum(summary["ingest"].values()) == SCENES + BROKEN
    for stage in ("stage1", "stage2"):
        assert summary[stage]["loss_after"] < summary[stage]["loss_before"]
    assert set(summary["seconds"]) == {"ingest", "stage1", "stage2", "recaption", "reconstruct"}
    assert summary["versions"]["torch"].startswith("2.13")


def test_every_held_out_image_has_one_caption(demo: Path) -> None:
    captions = [row["key"] for row in read_rows(parquet_files(str(demo / "captions")), ["key"])]
    assert len(captions) == len(set(captions)) > 0
    images = {
        row["key"]
        for row in read_rows(parquet_files(str(demo / "images")), ["key", "status"])
        if row["status"] == "ok"
    }
    assert set(captions) < images
    assert Table(demo / "pairs").counts() == {"ok": SCENES}


def test_report_stands_alone(demo: Path) -> None:
    outside: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                if name in ("src", "href") and not (value or "").startswith(("data:", "#")):
                    outside.append(f"{tag} {value}")

    text = (demo / "report.html").read_text()
    Links().feed(text)
    assert not outside
    assert "random weights" in text


def test_a_finished_demo_is_not_run_again(demo: Path) -> None:
    before = (demo / "stage2/metrics.jsonl").stat().st_mtime_ns
    again = subprocess.run(command(demo), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (demo / "stage2/metrics.jsonl").stat().st_mtime_ns == before


def test_other_settings_move_it_aside(demo: Path) -> None:
    import pipelines.demo as module

    config = module.DemoConfig(run_dir=str(demo), scenes=SCENES + 1)
    module._Demo(config, ROOT / "jobs/configs/tiny").claim()
    assert (demo.with_name("demo-1") / "report.html").is_file()
    assert [p.name for p in demo.iterdir()] == ["demo.json"]
