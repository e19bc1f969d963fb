"""What `make demo` may be told; everything else is in jobs/configs/tiny."""

from __future__ import annotations

from pydantic import Field

from pipelines.cli.config import InputPath, OutputPath
from pipelines.execution.connection import RayConfig
from vlv_model.config import Config

# A worker of Ray Train and a step of Ray Data are each given a logical CPU: with fewer than these
# they would wait for one another for ever on a small machine.
LOGICAL_CPUS = 4


_FEWER_STOPS = {"eval_every": 250, "eval_rows": 256, "checkpoint_every": 250}
FULL: dict[str, dict[str, float]] = {
    "stage1": {
        # With 600 two runs of four mixed up the colours of pairs that they never saw (docs/method.md).
        "steps": 1_200,
        "learning_rate": 3e-3,
        "pretrained_rate": 0.2,
        "warmup_steps": 100,
        **_FEWER_STOPS,
    },
    "stage2": {"steps": 600, **_FEWER_STOPS},
}
"""What a full training sets otherwise than jobs/configs/tiny, under `train`."""


class DemoConfig(Config):
    """Everything that `jobs/demo.py` needs to know."""

    run_dir: OutputPath = Field(
        "runs/demo", description="folder of everything that the demo leaves"
    )
    photos: InputPath | None = Field(
        None, description="folder of photographs to use in place of the tiny world's scenes"
    )
    full: bool = Field(
        False,
        description="train stage 1 from the pretrained parts, on five times the scenes (about 15 "
        "minutes on two idle cores), rather than from the shipped stage-1 weights",
    )
    scenes: int | None = Field(
        None, ge=50, description="training scenes that are drawn; default: 1,600, full: 8,000"
    )
    test_scenes: int = Field(
        400, ge=2, description="scenes to be judged on; every second has a held-out combination"
    )
    broken_urls: int = Field(40, ge=0, description="broken and missing URLs that are mixed in")
    seed: int = Field(0, ge=0, description="seed of the scenes and the training")
    stage1_steps: int | None = Field(None, ge=1, description="default: as in configs/tiny")
    stage2_steps: int | None = Field(None, ge=1, description="default: as in configs/tiny")
    ray: RayConfig = RayConfig(num_cpus=LOGICAL_CPUS)

    @property
    def num_scenes(self) -> int:
        return self.scenes or (8_000 if self.full else 1_600)
