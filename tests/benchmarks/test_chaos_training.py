"""The fault benchmark detects wrong training runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.faults.jobs import Job
from benchmarks.faults.training import Run, compare

STEPS = 4


def run(folder: Path, **changed: Any) -> Path:
    """A finished run of four steps; `changed` replaces figures of the third."""
    lines = [{"event": "step", "step": s, "keys": f"{s:016x}", "loss": 1 / s} for s in range(1, 5)]
    lines[2] |= changed
    lines.append({"event": "eval", "step": 4, "heldout_loss": 0.5})
    checkpoint = folder / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    write(folder, lines)
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": 4}))
    for name in ("model", "optimizer"):
        save_file({"x": torch.zeros(9)}, checkpoint / f"{name}.safetensors")
    return folder


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def job() -> Job:
    return Job(lambda target: [], lambda target: [], expected=range(1, STEPS + 1), span=1)


def test_equal_runs_pass(tmp_path: Path, job: Job) -> None:
    found = compare(run(tmp_path / "a"), run(tmp_path / "b"), job)
    assert found.is_right
    assert found.largest_difference == 0


@pytest.mark.parametrize(
    ("changed", "figure"),
    [({"keys": "f" * 16}, "other_rows"), ({"loss": 0.34}, "largest_difference")],
)
def test_other_rows_or_losses_are_detected(
    tmp_path: Path, job: Job, changed: dict[str, Any], figure: str
) -> None:
    found = compare(run(tmp_path / "a", **changed), run(tmp_path / "b"), job)
    assert not found.is_right
    assert getattr(found, figure) > 0


def test_lost_and_duplicate_steps_and_leftovers_are_detected(tmp_path: Path, job: Job) -> None:
    broken, intact = run(tmp_path / "a"), run(tmp_path / "b")
    lines = events(broken)
    write(broken, [*lines[:2], lines[1], *lines[3:]])
    (broken / "checkpoints" / ".step-00000002.x").mkdir()
    (broken / "checkpoints" / "step-00000004" / "optimizer.safetensors").write_bytes(b"x")
    found = compare(broken, intact, job)
    assert (found.lost, found.doubled, found.left_behind) == (1, 1, 1)
    assert len(found.damaged) == 1
    assert not found.is_right
    assert "step-00000004" in (Run(broken).find_damage() or "")
    assert Run(intact).find_damage() is None
