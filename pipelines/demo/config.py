"""Settings of `make demo`; the jobs' settings are in jobs/configs/tiny."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from pipelines.cli.config import InputPath, OutputPath
from pipelines.execution.connection import RayConfig
from vlv_model.config import Config

# Ray Train workers and Ray Data steps need a logical CPU each; with fewer than 4 they would deadlock
# on a small machine.
LOGICAL_CPUS = 4


_INTERVALS = {"eval_every": 250, "eval_rows": 256, "checkpoint_every": 250}
FULL: dict[str, dict[str, float]] = {
    "stage1": {
        # With 600 steps, two of four runs confused the colours of unseen pairs (docs/method.md).
        "steps": 1_200,
        "learning_rate": 3e-3,
        "pretrained_rate": 0.2,
        "warmup_steps": 100,
        **_INTERVALS,
    },
    "stage2": {"steps": 600, **_INTERVALS},
}
"""Settings under `train` by which a full training differs from jobs/configs/tiny."""


class DemoConfig(Config):
    """All settings of `jobs/demo.py`."""

    run_dir: OutputPath = Field("runs/demo", description="folder of all files of the demo")
    photos: InputPath | None = Field(
        None, description="folder of photographs to use instead of the tiny world's scenes"
    )
    full: bool = Field(
        False,
        description="train stage 1 from the pretrained parts on five times as many scenes (about 15 "
        "minutes on two idle cores), instead of from the shipped stage-1 weights",
    )
    scenes: int | None = Field(
        None, ge=50, description="number of training scenes; default: 1,600, full: 8,000"
    )
    test_scenes: int = Field(
        400, ge=2, description="number of test scenes; every second has a held-out combination"
    )
    seed: int = Field(0, ge=0, description="seed of the scenes and the training")
    stage1_steps: int | None = Field(None, ge=1, description="default: as in configs/tiny")
    stage2_steps: int | None = Field(None, ge=1, description="default: as in configs/tiny")
    ray: RayConfig = RayConfig(num_cpus=LOGICAL_CPUS)

    removed: ClassVar[Mapping[str, str]] = {
        "broken_urls": "they are an eighth as many as the scenes, at most 40"
    }

    @property
    def num_scenes(self) -> int:
        return self.scenes or (8_000 if self.full else 1_600)

    @property
    def num_broken(self) -> int:
        """Broken and missing URLs in the list, beside those of the scenes."""
        return min(40, self.num_scenes // 8)
