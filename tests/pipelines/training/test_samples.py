"""When samples of checkpoints are made, and what becomes of those that cannot be."""

import time
from pathlib import Path

import numpy as np
import pytest
import ray

from pipelines.images.random_access import RowIndex
from pipelines.report.gallery import GalleryItem
from pipelines.training.samples import Sampler, Samples
from tests.pipelines.training.test_checkpointing import write
from vlv_model.config import ModelConfig

pytestmark = pytest.mark.end_to_end

STEPS = 12


def test_failed_samples_print_a_line_and_do_not_stop_the_run(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, STEPS)
    nothing = RowIndex([tmp_path / "gone.parquet"], *np.zeros((4, 1), np.int64))
    samples = Samples(tmp_path, ModelConfig(), nothing, captions=False)
    sampler = Sampler(samples, STEPS, use_gpu=False, resources={})
    sampler.finish(lambda step, items: pytest.fail("there are none"))
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("no samples of step 12: "))
    assert "gone.parquet" in line


def test_memory_reserved_for_samples_fits_a_machine(ray_local: None, tmp_path: Path) -> None:
    nothing = RowIndex([], *np.zeros((4, 0), np.int64))
    sampler = Sampler(Samples(tmp_path, ModelConfig(), nothing, captions=True), STEPS, False, {})
    sampler.handle({"event": "start", "step": 0, "parameters": 10_000_000})
    (machine,) = (node["Resources"]["memory"] for node in ray.nodes())
    assert sampler._memory("CPU") == min(50_000_000 + (2 << 30), int(machine))
    sampler.handle({"event": "start", "step": 0, "parameters": 10**15})
    assert sampler._memory("CPU") == int(machine)


class EndlessUntilTheLast(Samples):
    """Finishes only the samples of the last step."""

    def make(self, step: int, use_gpu: bool) -> list[GalleryItem]:
        if step < STEPS:
            self.page(step).with_suffix(".began").touch()
            time.sleep(1000)
        self.page(step).touch()
        return [GalleryItem(1, b"", None, None, None, "ok")]


def test_the_last_samples_cancel_a_running_task(ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    nothing = RowIndex([], *np.zeros((4, 0), np.int64))
    endless = EndlessUntilTheLast(tmp_path, ModelConfig(), nothing, captions=False)
    shown: list[int] = []

    def show(step: int, items: list[GalleryItem]) -> None:
        shown.append(step)

    sampler = Sampler(endless, STEPS, use_gpu=False, resources={})
    for event, step in [("eval", 0), ("checkpoint", 4)]:
        sampler.handle({"event": event, "step": step})
    deadline = time.monotonic() + 100
    while not list(endless.run_dir.rglob("*.began")) and time.monotonic() < deadline:
        sampler.poll(show)
        time.sleep(0.1)
    for event in ("eval", "checkpoint"):
        sampler.handle({"event": event, "step": STEPS})
    sampler.poll(show)
    sampler.finish(show)
    assert list(endless.run_dir.rglob("*.began"))
    assert shown == [STEPS]
    sampler.finish(show)  # started again: they exist
    assert shown == [STEPS]
