"""The phases of the demo, on the tiny world or on photographs.

runs/demo/
  demo.json            the demo's settings, and the seconds of each phase so far
  world/               files of the local web server, lists of URLs, the teacher's captions
  models/              tiny base models and the shipped stage-1 weights
  images/ stage1/ stage2/                      training: tables and runs
  test_images/ captions/ reconstructions/       test scenes and the outputs for them
  control/             the same stage 2 on an encoder without stage 1, and its captions
  proof.json           scores of the outputs
  report.html summary.json

Photographs have no ground truth: captions and reconstructions are of held-out images, without scores.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.cli.config import dump, load
from pipelines.demo.config import FULL, DemoConfig
from pipelines.execution.connection import ray_session
from pipelines.report.versions import versions
from pipelines.storage.files import write_atomically
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import Table, check_unused, read_json_object
from pipelines.tiny_world.dataset import find_photos
from pipelines.tiny_world.pretrained import MODELS, STAGE1
from vlv_model.config import Config

if TYPE_CHECKING:
    from pipelines.reconstruct.config import ReconstructConfig

C = TypeVar("C", bound=Config)

MARKER = "demo.json"


def run_demo(config: DemoConfig, configs: Path) -> dict[str, Any]:
    """Run all unfinished phases; returns the summary.

    `configs` is the folder of the jobs' YAML files for the tiny world. Raises RunError when `run_dir`
    holds other files, and the errors of the jobs.
    """
    # Imported here, since the model libraries would delay --help.
    from pipelines.demo.report import print_summary, write_demo_report

    demo = Demo(config, configs)
    demo.claim()
    with lock_folder(demo.folder, "run_dir"), ray_session(config.ray):
        ingested = demo.ingest()
        stage1 = demo.stage1()
        stage2 = demo.stage2("stage2", demo.folder / "stage1")
        captioned = demo.recaption("captions", demo.folder / "stage2")
        reconstructed = demo.reconstruct()
        proof = None if config.photos else demo.proof()
    losses = ("loss_before", "loss_after", "steps")
    summary = {
        "ingest": ingested,
        "stage1": {
            **{name: stage1[name] for name in losses},
            "warm_start": demo.warm_start,
            "columns_read": stage1["columns_read"],
        },
        "stage2": {name: stage2[name] for name in losses},
        "recaption": captioned,
        "reconstruct": reconstructed,
        **(proof or {}),
        "seconds": {name: round(spent, 1) for name, spent in demo.seconds.items()},
        "versions": versions(),
        "photos": config.photos,
        "full": config.full,
        "seed": config.seed,
    }
    write_atomically(demo.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_demo_report(demo.folder, summary)
    print_summary(summary, demo.folder)
    return summary


class Demo:
    """The phases, and the time of each over all attempts."""

    def __init__(self, config: DemoConfig, configs: Path) -> None:
        self.config = config
        self.configs = configs
        self.folder = Path(config.run_dir)
        self.settings = {k: v for k, v in dump(config).items() if k not in ("run_dir", "ray")}
        self.seconds: dict[str, float] = {}
        self.warm_start = not config.full

    def claim(self) -> None:
        """Continue the folder's demo, or rename the folder if that has other settings.

        Raises errors of the settings before renaming anything.
        """
        if self.config.photos:
            find_photos(self.config.photos)
        marker = self.folder / MARKER
        if os.path.isfile(marker):
            recorded = read_json_object(marker)
            if recorded.get("settings") == self.settings:
                self.seconds = recorded.get("seconds", {})
                return
            aside = next(
                folder
                for n in range(1, 10_000)
                if not (folder := self.folder.with_name(f"{self.folder.name}-{n}")).exists()
            )
            self.folder.rename(aside)
            print(f"{self.folder} held a demo with other settings: renamed to {aside}")
        else:
            check_unused(self.folder, (), "demo", "run_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save_state()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase's seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._save_state()

    def _save_state(self) -> None:
        content = {"settings": self.settings, "seconds": self.seconds}
        write_atomically(self.folder / MARKER, json.dumps(content, indent=2))

    def job(self, cls: type[C], name: str, *settings: str) -> C:
        """A job's settings: its YAML file for the tiny world, overridden by `settings`."""
        return load(cls, str(self.configs / f"{name}.yaml"), settings)

    # ----------------------------------------------------------------------------- phases

    def ingest(self) -> dict[str, int]:
        from pipelines.tiny_world.dataset import write_photos, write_world
        from pipelines.tiny_world.server import serve

        world, config = self.folder / "world", self.config
        tables = [Table(self.folder / name) for name in ("images", "test_images")]
        tables = tables[:1] if config.photos else tables
        if all(table.exists and not table.pending() for table in tables):
            return tables[0].counts()
        world.mkdir(exist_ok=True)
        with self.phase("ingest"), serve(world, keep_port=tables[0].exists) as web:
            # With the same port, each attempt writes byte-identical files.
            seed, url = config.seed, web.base_url
            if config.photos:
                write_photos(world, url, config.photos, seed=seed, num_broken=config.num_broken)
            else:
                write_world(world, url, config.num_scenes, seed, num_broken=config.num_broken)
                write_world(world / "test", f"{url}/test", config.test_scenes, seed, "test")
                self._ingest(world / "test", tables[1])
            return self._ingest(world, tables[0])

    def _ingest(self, world: Path, table: Table) -> dict[str, int]:
        from pipelines.ingest.config import IngestConfig
        from pipelines.ingest.job import ingest

        folders = (f"data.input={world / 'metadata.parquet'}", f"data.output={table.folder}")
        return ingest(self.job(IngestConfig, "ingest", *folders))

    def stage1(self, run: str = "stage1", *settings: str) -> dict[str, Any]:
        """Train stage 1 in the folder `run`; `settings` override the demo's."""
        from pipelines.training.config import Stage1Config
        from pipelines.training.job import train

        with self.phase(run):
            return train(
                self.job(
                    Stage1Config,
                    "stage1",
                    f"data.input={self.folder / 'images'}",
                    f"model.path={self._models() / (STAGE1 if self.warm_start else MODELS)}",
                    *self._training("stage1", run, self.config.stage1_steps),
                    *settings,
                )
            )

    def stage2(self, run: str, encoder: Path, *settings: str) -> dict[str, Any]:
        """Train stage 2 in the folder `run` on the encoder of a stage-1 run or checkpoint."""
        from pipelines.training.config import Stage2Config
        from pipelines.training.job import train

        with self.phase(run):
            job = self.job(
                Stage2Config,
                "stage2",
                f"data.input={self.folder / 'images'}",
                f"data.captions={self.folder / 'world' / 'teacher.parquet'}",
                f"model.path={encoder}",
                *self._training("stage2", run, self.config.stage2_steps),
                *settings,
            )
            return train(job)

    def recaption(self, output: str, captioner: Path) -> dict[str, int]:
        from pipelines.recaption.config import RecaptionConfig
        from pipelines.recaption.job import recaption

        with self.phase("recaption"):
            table = f"data.output={self.folder / output}"
            model = f"model.path={captioner}"
            return recaption(self.job(RecaptionConfig, "recaption", *self._unseen, table, model))

    def reconstruct(self) -> dict[str, int]:
        from pipelines.reconstruct.job import reconstruct

        with self.phase("reconstruct"):
            return reconstruct(self.reconstruction())

    def reconstruction(self) -> ReconstructConfig:
        """Settings of reconstruction; images from captions are sampled with the same ones."""
        from pipelines.reconstruct.config import ReconstructConfig

        return self.job(
            ReconstructConfig,
            "reconstruct",
            *self._unseen,
            f"data.output={self.folder / 'reconstructions'}",
            f"model.path={self.folder / 'stage1'}",
            f"diffusion.seed={self.config.seed}",
        )

    def proof(self) -> dict[str, Any]:
        """Train the control, and score its outputs and the demo's."""
        from pipelines.demo.proof import TestScenes, prove, write_untrained

        file, control = self.folder / "proof.json", self.folder / "control"
        if file.is_file():
            return read_json_object(file)
        untrained = write_untrained(control / "untrained", self._models() / MODELS)
        self.stage2("control/stage2", untrained)
        self.recaption("control/captions", control / "stage2")
        with self.phase("proof"):
            scores = prove(
                self.folder, TestScenes.read(self.folder), self.reconstruction().diffusion
            )
        write_atomically(file, json.dumps(scores, indent=2))
        return scores

    @property
    def _unseen(self) -> list[str]:
        """Settings of the input for captions and reconstructions: images outside the training."""
        if self.config.photos:
            return [f"data.input={self.folder / 'images'}", "data.split=holdout"]
        return [f"data.input={self.folder / 'test_images'}", "data.split=all"]

    def _models(self) -> Path:
        """Copy the shipped models, so that the demo's folder is self-contained."""
        from pipelines.tiny_world import pretrained

        models = self.folder / "models"
        if not models.is_dir():
            copy = self.folder / "models.part"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(pretrained.FOLDER, copy)
            copy.rename(models)
        return models

    def _training(self, stage: str, run: str, steps: int | None) -> list[str]:
        """Settings of a training in the folder `run`; later ones override earlier ones."""
        settings = [f"run_dir={self.folder / run}", f"train.seed={self.config.seed}"]
        settings.append("train.samples=0")  # the report shows samples of more images
        if self.config.full:
            settings += [f"train.{name}={value}" for name, value in FULL[stage].items()]
        return settings + ([f"train.steps={steps}"] if steps else [])
