"""A small `make demo`: killed midway, continued, checked, run again."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipelines.cli.config import load
from pipelines.demo.config import DemoConfig
from pipelines.demo.job import Demo, run_demo
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import Table, parquet_files
from pipelines.training.caption_index import CaptionIndex
from tests.jobs.conftest import ROOT

pytestmark = pytest.mark.end_to_end

SCENES, BROKEN, TEST_SCENES = 64, 8, 12


def settings(run_dir: Path) -> list[str]:
    scenes = [f"scenes={SCENES}", f"test_scenes={TEST_SCENES}"]
    return [f"run_dir={run_dir}", *scenes, "stage1_steps=4", "stage2_steps=6"]


def command(python: Path, run_dir: Path) -> list[str]:
    return [str(python), "jobs/demo.py", *settings(run_dir)]


@pytest.fixture(scope="module")
def demo(forked_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo that was killed at the start of stage 1 and then finished."""
    run_dir = tmp_path_factory.mktemp("runs") / "demo"
    with open(run_dir.with_suffix(".log"), "w") as log:
        first = subprocess.Popen(command(forked_python, run_dir), cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 500
        while not (run_dir / "stage1/run.json").is_file():
            assert first.poll() is None, run_dir.with_suffix(".log").read_text()
            assert time.monotonic() < deadline, run_dir.with_suffix(".log").read_text()
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    second = subprocess.run(
        command(forked_python, run_dir), cwd=ROOT, capture_output=True, text=True
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.rstrip().endswith(str(run_dir / "report.html"))
    return run_dir


def test_summary_holds_the_figures(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["ingest"]["ok"] == SCENES
    assert sum(summary["ingest"].values()) == SCENES + BROKEN
    assert summary["stage2"]["loss_after"] < summary["stage2"]["loss_before"]
    phases = {"ingest", "stage1", "stage2", "control/stage2", "recaption", "reconstruct", "proof"}
    assert set(summary["seconds"]) == phases
    assert summary["versions"]["torch"].startswith("2.13")


def test_stage1_reads_no_caption(demo: Path) -> None:
    stage1 = json.loads((demo / "summary.json").read_text())["stage1"]
    assert stage1["columns_read"] == ["key", "image"]
    assert stage1["warm_start"] is True


def test_every_test_scene_is_judged(demo: Path) -> None:
    captions = [row["key"] for row in read_rows(parquet_files(str(demo / "captions")), ["key"])]
    assert len(captions) == len(set(captions)) == TEST_SCENES
    tables = ("images", "test_images")
    trained, judged = (
        {row["key"] for row in read_rows(parquet_files(str(demo / table)), ["key"])}
        for table in tables
    )
    assert set(captions) == judged
    assert not trained & judged
    joined = CaptionIndex.open(demo / "stage2/captions").about()["counts"]
    assert (joined["images"], joined["images_without_caption"]) == (SCENES, 0)

    summary = json.loads((demo / "summary.json").read_text())
    for scores in (summary["captions"], summary["control"]):
        assert scores["scenes"] == scores["scenes_held_out_combinations"] == TEST_SCENES / 2
        for name in ("attributes", "attributes_held_out_combinations"):
            assert set(scores[name]) == {"size", "colour", "shape", "relation", "background"}
            assert all(0 <= share <= 1 for share in scores[name].values())
    pictures = summary["reconstruction"]
    assert pictures["floor"] < pictures["ceiling"] <= 1
    assert pictures["pictures"] == TEST_SCENES
    losses = summary["denoising"]
    assert losses["true_caption"] < losses["encoder"] < losses["no_caption"]
    gap = losses["no_caption"] - losses["true_caption"]
    assert losses["gap_closed"] == pytest.approx((losses["no_caption"] - losses["encoder"]) / gap)


@pytest.mark.parametrize("name", ["images", "captions", "reconstructions"])
def test_its_tables_are_data_sets(demo: Path, name: str, tmp_path: Path) -> None:
    import datasets
    import duckdb

    folder, counts = demo / name, Table(demo / name).counts()
    opened = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    assert Counter(opened["status"]) == counts
    if name != "captions":
        assert isinstance(opened.features["image"], datasets.Image)
    question = f"select status, count(*) from '{folder}/**/*.parquet' group by status"
    assert dict(duckdb.sql(question).fetchall()) == counts
    assert str(demo) not in (folder / "README.md").read_text()


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
    assert "held-out combination" in text


def test_a_finished_demo_is_not_run_again(demo: Path, ray_local: None) -> None:
    before = (demo / "stage2/metrics.jsonl").stat().st_mtime_ns
    run_demo(load(DemoConfig, None, settings(demo)), ROOT / "jobs/configs/tiny")
    assert (demo / "stage2/metrics.jsonl").stat().st_mtime_ns == before


def test_other_settings_move_it_aside(demo: Path) -> None:
    config = DemoConfig(run_dir=str(demo), scenes=SCENES + 1)
    Demo(config, ROOT / "jobs/configs/tiny").claim()
    assert (demo.with_name("demo-1") / "report.html").is_file()
    assert [p.name for p in demo.iterdir()] == ["demo.json"]
