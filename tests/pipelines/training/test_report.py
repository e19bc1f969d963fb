"""The report of a training run: its figures, warnings and rows, from the files of a run folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.cli.config import load
from pipelines.report.gallery import GalleryItem
from pipelines.storage.tables import Table
from pipelines.tiny_world import scenes
from pipelines.training import report
from pipelines.training.config import Stage2Config, TrainConfig
from pipelines.training.page import Start, TrainingReport, render
from pipelines.training.sample_files import read_samples, write_samples
from tests.pipelines.report.pages import picture
from tests.pipelines.report.test_report_page import HOSTILE
from vlv_model.errors import RunError

KILLED = Path(__file__).parents[2] / "compatibility/made-2026-11/killed/stage1"


def step(number: int, **figures: Any) -> dict[str, Any]:
    event = {"event": "step", "step": number, "loss": 2.0 - number / 100, "learning_rate": 1e-3}
    event |= {"grad_norm": 0.5, "seconds": 2.0, "images_per_second": 32.0, "data_seconds": 0.0}
    return event | {"data_share": 0.0, "memory_gb": 1.5, **figures}


def evaluation(number: int, loss: float | None, rows: int = 64) -> dict[str, Any]:
    return {"event": "eval", "step": number, "heldout_loss": loss, "rows": rows}


@pytest.fixture
def content() -> TrainingReport:
    shown = scenes.sample(0, 2, "test")
    samples = {
        number: [
            GalleryItem(key, picture(s), None, f" a {number} dot", "a 400 dot", "ok")
            for key, s in enumerate(shown)
        ]
        for number in (200, 400)
    }
    return TrainingReport(
        title="Training run stage2",
        stage="stage2",
        state="finished",
        steps=400,
        schedule="train.schedule=cosine over 400 steps, 0 of them warm-up.",
        max_grad_norm=1.0,
        events=[
            evaluation(0, 2.5),
            *(step(n, grad_norm=n / 200, data_seconds=0.1) for n in range(1, 401)),
            evaluation(400, 1.25),
        ],
        notes=["Look twice."],
        rows={"trained on": 900, "held out": 64, "not used: download:dns": 36},
        samples=samples,
        sampled_images=2,
        starts=[Start("2026-12-01 10:00", 0, 2, "CPU", 0), Start("2026-12-01 11:00", 200, 1, "CPU", 7)],
        identity=[("model.florence digest", "0123456789abcdef")],
        settings=[("train.samples", "2")],
        versions={"torch": "2.13.0"},
    )  # fmt: skip


def test_every_figure_is_shown(content: TrainingReport, parse: Any) -> None:
    document = parse(render(content))
    text = document.text.replace("\u00a0", " ")
    for words in (
        "Training run stage2", "Look twice.", "Steps 400 of 400, finished", "−50.0 % 2.500 → 1.250",
        "Speed 32 images per second", "5.0 % of the time of the last 50 steps", "1.5 GB",
        "so clipped, in 200 of 400 steps (50.0 %)", "trained on 900 90.0 %", "all 1,000",
        "2026-12-01 11:00 200 7 1 CPU", "13 min 20 s", "model.florence digest 0123456789abcdef", "torch 2.13.0",
    ):  # fmt: skip
        assert words in text, words
    lines = [f for f in document.all("figure", of_class="chart") if f.all("path", of_class="line")]
    titles = [figure.all("h3")[0].text for figure in lines]
    assert titles == ["Learning rate", "Gradient norm", "Speed", "Waiting for rows", "Memory"]


def test_samples_of_several_steps_stand_side_by_side(content: TrainingReport, parse: Any) -> None:
    first, _ = parse(render(content)).all("ul", of_class="steps")[0].all("li")
    assert [term.text for term in first.all("dt")] == [
        "step 200", "step 400 exact match", "teacher’s caption"
    ]  # fmt: skip
    assert [mark.text for mark in first.all("mark")] == ["200"]
    assert [figure.text for figure in first.all("figcaption")] == ["original"]
    pictures = {n: [replace(i, reconstruction=i.original, caption=None, target=None) for i in items]
                for n, items in content.samples.items()}  # fmt: skip
    first, _ = (
        parse(render(replace(content, samples=pictures))).all("ul", of_class="steps")[0].all("li")
    )
    assert [f.text for f in first.all("figcaption")] == ["original", "step 200", "step 400"]
    assert not first.all("dd")


def test_nothing_overflows_and_hostile_text_stays_text(
    content: TrainingReport, parse: Any, overflowing: Any
) -> None:
    long = "x" * 200
    items = {n: [replace(i, caption=HOSTILE + long, target=long) for i in items]
             for n, items in content.samples.items()}  # fmt: skip
    page = render(
        replace(content, title=long, samples=items, notes=[HOSTILE], settings=[(long, HOSTILE + long)],
                rows={f"not used: {long}": 10**12}, identity=[("model", long)])
    )  # fmt: skip
    assert not parse(page).all("script")
    assert HOSTILE.replace("\0", "�") in parse(page).all("aside")[0].text
    assert overflowing([page, render(content)], widths=[360, 900]) == []


def test_a_run_without_a_step_has_a_page(content: TrainingReport, parse: Any) -> None:
    empty = replace(content, events=[], samples={}, starts=[], versions={}, sampled_images=0)
    text = parse(render(empty)).text
    for words in (
        "Steps 0",
        "No evaluation on held-out rows",
        "no samples are made",
        "No start is",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([evaluation(0, 1.0, rows=49)], "The held-out loss is of 49 rows; below 50"),
        ([evaluation(0, 1.0, rows=50)], None),
        ([evaluation(0, None, rows=0)], "nothing is evaluated"),
        ([evaluation(0, 1.0), evaluation(5, float("nan"))], "held-out loss is not finite"),
        ([evaluation(0, 2.0), evaluation(5, 1.0), evaluation(9, 1.2)],
         "lowest at step 5 (1.000), and is 20.0 % higher at step 9"),
        ([evaluation(0, 2.0), evaluation(5, 1.0), evaluation(9, 1.001)], None),
        ([step(1, loss=float("inf"))], "training loss is not finite in 1 steps"),
        ([step(n, grad_norm=1.0 + (n > 10)) for n in range(1, 21)], "clipped in 50.0 % of the last 20"),
        ([step(n, grad_norm=1.0 + (n > 11)) for n in range(1, 21)], None),
        ([step(n, data_seconds=0.05) for n in range(1, 21)], "2.5 % of the time of the last 20 steps"),
        ([step(n, data_seconds=0.03) for n in range(1, 21)], None),
    ],
)  # fmt: skip
def test_warnings(events: list[dict[str, Any]], words: str | None) -> None:
    lines = [line.replace("\u00a0", " ") for line in report.warnings(TrainConfig(), events, {})]
    assert words is None if not lines else words is not None and words in lines[0], lines


def test_unused_rows_and_the_end_of_a_failed_run_are_warnings() -> None:
    rows = {"trained on": 80, "held out": 5, "not used: download:dns": 15}
    failure = RunError("the GPU is gone")
    failed, unused, removed = report.warnings(TrainConfig(), [], rows, 3, failure)
    assert "ended with an error: the GPU is gone" in failed
    assert "15 of the 100 rows" in unused
    assert "3 rows were removed" in removed
    assert report.warnings(TrainConfig(), [], rows | {"not used: download:dns": 1}) == []


def test_rows_add_up_to_the_input(tmp_path: Path) -> None:
    table = Table(tmp_path / "images")
    table.create("image", {}, 1)
    statuses = ["ok"] * 7 + ["download:dns"] * 2
    table.write(0, pa.table({"key": range(9), "status": statuses}))
    counted = report.count_rows(str(table.folder), 4, 2)
    assert counted == {
        "trained on": 4, "held out": 2, "without a caption, or added since the run began": 1,
        "not used: download:dns": 2,
    }  # fmt: skip
    assert report.count_rows(str(tmp_path), 4, 2) == {"trained on": 4, "held out": 2}
    pairs = Table(tmp_path / "pairs")
    pairs.create("pair", {}, 1, images=10)
    pairs.write(0, pa.table({"key": range(7), "status": ["ok"] * 7}))
    assert report.count_rows(str(pairs.folder), 5, 2) == {
        "trained on": 5, "held out": 2, "images without a caption": 3
    }  # fmt: skip


def test_the_page_of_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    """Its metrics have no start; the page is written during the run and at its end."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        (run_dir / name).write_bytes((KILLED / name).read_bytes())
    settings = [f"run_dir={run_dir}", f"data.input={tmp_path}", "train.steps=12"]
    config = load(Stage2Config, None, settings)
    written = report.RunReport(config, {"trained on": 18, "held out": 2})
    written.update()
    page = run_dir / report.FILE
    assert "of 12, as of 20" in page.read_text()
    page.unlink()
    written.update()  # too early for another one
    assert not page.exists()
    (run_dir / "result.json").write_text("{}")
    written.write()
    assert "of 12, finished" in page.read_text()
    written.write(RunError("it broke"))
    assert "ended with an error: it broke" in page.read_text()


def test_the_page_of_a_run_on_images_of_others(tmp_path: Path) -> None:
    """A folder of images has no number of bytes in the run's identity, but a layout."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_bytes((KILLED / "metrics.jsonl").read_bytes())
    identity = json.loads((KILLED / "run.json").read_text())
    identity |= {"bytes": None, "files": None, "layout": "folder"}
    (run_dir / "run.json").write_text(json.dumps(identity))
    settings = [f"run_dir={run_dir}", f"data.input={tmp_path}", "train.steps=12"]
    report.RunReport(load(Stage2Config, None, settings), {"trained on": 18, "held out": 2}).write()
    page = (run_dir / report.FILE).read_text()
    assert "training rows" in page
    assert "bytes of data.input" not in page


def test_a_report_that_cannot_be_written_does_not_stop_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(Stage2Config, None, [f"run_dir={tmp_path / 'gone'}", f"data.input={tmp_path}"])
    report.RunReport(config, {}).update()
    assert "warning: no report of this run" in capsys.readouterr().err


def test_samples_are_kept_small_and_evenly_spaced(tmp_path: Path) -> None:
    import io

    from PIL import Image

    large, buffer = Image.new("RGB", (1000, 500), "teal"), io.BytesIO()
    large.save(buffer, "PNG")
    tiny = picture(scenes.sample(0, 1)[0])
    (tmp_path / "samples").mkdir()
    for number in range(0, 101, 10):
        write_samples(
            tmp_path, number, [GalleryItem(number, buffer.getvalue(), tiny, None, "a", "ok")]
        )
    samples = read_samples(tmp_path, 3)
    assert {at: items[0].key for at, items in samples.items()} == {0: 0, 50: 50, 100: 100}
    (item,) = samples[0]
    assert Image.open(io.BytesIO(item.original)).size == (256, 128)
    assert (item.reconstruction, item.target, item.caption) == (tiny, "a", None)
    assert read_samples(tmp_path / "none", 3) == {}


def test_starts_and_repeated_steps_are_logged(tmp_path: Path) -> None:
    from pipelines.training.metrics import MetricsLog, read_metrics

    lines = [{"event": "start", "step": 0}, *({"event": "step", "step": n} for n in range(1, 6))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert MetricsLog(tmp_path).begin(3) == 2
    assert [e["event"] for e in read_metrics(tmp_path)] == ["start", "step", "step", "step"]
