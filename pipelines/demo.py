"""The whole path on one machine: the jobs one after the other on the tiny world or on photographs.

runs/demo/
  demo.json            the demo's settings, and the seconds that each phase has taken so far
  world/               what the local web server serves, the list of URLs, the teacher's captions
  models/              tiny base models
  images/ pairs/ captions/ reconstructions/    the tables
  stage1/ stage2/      the runs
  report.html summary.json
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from pipelines.config import InputPath, OutputPath, dump, load
from pipelines.runtime import RayConfig, ray_session
from pipelines.storage import Table, exclusive, read_json_object, refuse_strangers, write_atomically
from pipelines.tiny_world.dataset import find_photos
from vlv_model.config import Config

C = TypeVar("C", bound=Config)

MARKER = "demo.json"
PACKAGES = ("ray", "torch", "deepspeed", "transformers", "diffusers", "pyarrow")
# A worker of Ray Train and a step of Ray Data are each given a logical CPU: with fewer than these
# they would wait for one another for ever on a small machine.
LOGICAL_CPUS = 4


class DemoConfig(Config):
    """What `make demo` may be told; everything else is in jobs/configs/tiny."""

    run_dir: OutputPath = Field(
        "runs/demo", description="folder of everything that the demo leaves"
    )
    photos: InputPath | None = Field(
        None, description="folder of photographs to use in place of the tiny world's scenes"
    )
    scenes: int = Field(800, ge=50, description="scenes that are drawn")
    broken_urls: int = Field(40, ge=0, description="broken and missing URLs that are mixed in")
    seed: int = Field(0, ge=0, description="seed of the scenes, the models and the training")
    stage1_steps: int | None = Field(None, ge=1, description="default: as in configs/tiny")
    stage2_steps: int | None = Field(None, ge=1, description="default: as in configs/tiny")
    ray: RayConfig = RayConfig(num_cpus=LOGICAL_CPUS)


def run_demo(config: DemoConfig, configs: Path) -> dict[str, Any]:
    """Run all phases, or those that a killed demo has left to do; returns the summary.

    `configs` is the folder of the jobs' YAML files for the tiny world. Raises RunError where
    `run_dir` holds something that no demo wrote, and what the jobs raise.
    """
    demo = _Demo(config, configs)
    demo.claim()
    with exclusive(demo.folder, "run_dir"), ray_session(config.ray):
        ingested = demo.ingest()
        stage1 = demo.stage1()
        stage2 = demo.stage2()
        captioned = demo.recaption()
        reconstructed = demo.reconstruct()
    summary = {
        "ingest": ingested,
        "stage1": {name: stage1[name] for name in ("loss_before", "loss_after")},
        "stage2": {name: stage2[name] for name in ("loss_before", "loss_after")},
        "recaption": captioned,
        "reconstruct": reconstructed,
        "seconds": {name: round(spent, 1) for name, spent in demo.seconds.items()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "photos": config.photos,
        "seed": config.seed,
    }
    write_atomically(demo.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    demo.report(summary)
    _print(summary, demo.folder)
    return summary


class _Demo:
    """The phases, and the time that each has taken over all attempts."""

    def __init__(self, config: DemoConfig, configs: Path) -> None:
        self.config = config
        self.configs = configs
        self.folder = Path(config.run_dir)
        self.settings = {k: v for k, v in dump(config).items() if k not in ("run_dir", "ray")}
        self.seconds: dict[str, float] = {}

    def claim(self) -> None:
        """Continue the demo that the folder holds; move a demo with other settings aside.

        What is wrong with the settings is said before anything is moved.
        """
        if self.config.photos:
            find_photos(self.config.photos)
        marker = self.folder / MARKER
        if os.path.isfile(marker):
            held = read_json_object(marker)
            if held.get("settings") == self.settings:
                self.seconds = held.get("seconds", {})
                return
            aside = next(
                folder
                for n in range(1, 10_000)
                if not (folder := self.folder.with_name(f"{self.folder.name}-{n}")).exists()
            )
            self.folder.rename(aside)
            print(f"{self.folder} held a demo with other settings: it is {aside} now")
        else:
            refuse_strangers(self.folder, (), "demo", "run_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count a phase's time; a phase that was finished before takes none and is not counted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._note()

    def _note(self) -> None:
        content = {"settings": self.settings, "seconds": self.seconds}
        write_atomically(self.folder / MARKER, json.dumps(content, indent=2))

    def job(self, cls: type[C], name: str, *settings: str) -> C:
        """A job's settings: its YAML file for the tiny world, with this demo's folders."""
        return load(cls, str(self.configs / f"{name}.yaml"), settings)

    # ----------------------------------------------------------------------------- phases

    def ingest(self) -> dict[str, int]:
        from pipelines.ingest.dataset import IngestConfig, ingest
        from pipelines.tiny_world.dataset import write_photos, write_world
        from pipelines.tiny_world.server import serve

        world, config = self.folder / "world", self.config
        images = Table(self.folder / "images")
        if images.exists and not images.pending():
            return images.counts()
        world.mkdir(exist_ok=True)
        with self.phase("ingest"), serve(world, keep_port=images.exists) as web:
            # The same files byte by byte at every attempt, as long as the port is the same.
            seed, broken = config.seed, config.broken_urls
            if config.photos:
                write_photos(world, web.base_url, config.photos, seed=seed, num_broken=broken)
            else:
                write_world(world, web.base_url, config.scenes, seed=seed, num_broken=broken)
            job = self.job(
                IngestConfig,
                "ingest",
                f"data.input={world / 'metadata.parquet'}",
                f"data.output={self.folder / 'images'}",
            )
            return ingest(job)

    def stage1(self) -> dict[str, Any]:
        from pipelines.training.config import Stage1Config
        from pipelines.training.trainer import train

        with self.phase("stage1"):
            models = self.folder / "models"
            if not (models / "model.json").is_file():
                from vlv_model.tiny import write_tiny_models

                shutil.rmtree(models, ignore_errors=True)
                write_tiny_models(models, self.config.seed)
            return train(
                self.job(
                    Stage1Config,
                    "stage1",
                    f"data.input={self.folder / 'images'}",
                    f"model.path={models}",
                    *self._training("stage1", self.config.stage1_steps),
                )
            )

    def stage2(self) -> dict[str, Any]:
        from pipelines.pairs import with_pairs
        from pipelines.training.config import Stage2Config
        from pipelines.training.trainer import train

        with self.phase("stage2"):
            job = self.job(
                Stage2Config,
                "stage2",
                f"data.input={self.folder / 'images'}",
                f"data.captions={self.folder / 'world' / 'teacher.parquet'}",
                f"data.output={self.folder / 'pairs'}",
                f"model.path={self.folder / 'stage1'}",
                *self._training("stage2", self.config.stage2_steps),
            )
            return train(with_pairs(job))

    def recaption(self) -> dict[str, int]:
        from pipelines.recaption.config import RecaptionConfig
        from pipelines.recaption.dataset import recaption

        with self.phase("recaption"):
            return recaption(
                self.job(
                    RecaptionConfig,
                    "recaption",
                    f"data.input={self.folder / 'images'}",
                    f"data.output={self.folder / 'captions'}",
                    f"model.path={self.folder / 'stage2'}",
                )
            )

    def reconstruct(self) -> dict[str, int]:
        from pipelines.reconstruct.config import ReconstructConfig
        from pipelines.reconstruct.dataset import reconstruct

        with self.phase("reconstruct"):
            return reconstruct(
                self.job(
                    ReconstructConfig,
                    "reconstruct",
                    f"data.input={self.folder / 'images'}",
                    f"data.output={self.folder / 'reconstructions'}",
                    f"model.path={self.folder / 'stage1'}",
                    f"diffusion.seed={self.config.seed}",
                )
            )

    def _training(self, stage: str, steps: int | None) -> list[str]:
        settings = [f"run_dir={self.folder / stage}", f"train.seed={self.config.seed}"]
        return settings + ([f"train.steps={steps}"] if steps else [])

    # ----------------------------------------------------------------------------- report

    def report(self, summary: dict[str, Any]) -> None:
        from pipelines.report.demo import DemoReport, GalleryItem, write_report
        from pipelines.storage import parquet_files, read_rows
        from pipelines.training.metrics import read_metrics

        def rows(table: str, *columns: str) -> dict[int, dict[str, Any]]:
            files = parquet_files(str(self.folder / table))
            return {row["key"]: row for row in read_rows(files, ["key", *columns])}

        pictures = rows("reconstructions", "image")
        captions = rows("captions", "caption", "status")
        keys = sorted(pictures)
        originals, pairs = rows("images", "image"), rows("pairs", "caption")
        gallery = [
            GalleryItem(
                key=key,
                original=originals[key]["image"]["bytes"],
                reconstruction=(pictures[key]["image"] or {}).get("bytes"),
                caption=captions[key]["caption"],
                target=pairs.get(key, {}).get("caption"),
                status=captions[key]["status"],
            )
            for key in keys
        ]
        notes = [
            "The base models are tiny and have random weights: reconstructions are noise, and "
            "captions say little. What is shown is that every part of the path works."
        ]
        if self.config.photos:
            notes.append(
                f"The images are photographs from {self.config.photos}. With tiny models of 64 "
                "pixels the figures prove nothing about quality."
            )
        report = DemoReport(
            title="VLV on Ray: demo" + (" on photographs" if self.config.photos else ""),
            notes=notes,
            ingest=summary["ingest"],
            stages={s: read_metrics(self.folder / s) for s in ("stage1", "stage2")},
            recaption=summary["recaption"],
            reconstruct=summary["reconstruct"],
            gallery=gallery,
            seconds=summary["seconds"],
            versions=summary["versions"],
        )
        write_report(self.folder / "report.html", report)


def _print(summary: dict[str, Any], folder: Path) -> None:
    ingested, captioned = summary["ingest"], summary["recaption"]
    print(
        f"\ningest     {ingested.get('ok', 0)} of {sum(ingested.values())} URLs are images, the "
        "others are rows that say why not"
    )
    for stage in ("stage1", "stage2"):
        losses = summary[stage]
        print(f"{stage}     held-out loss {losses['loss_before']:.4f} → {losses['loss_after']:.4f}")
    print(f"recaption  {captioned.get('ok', 0)} of {sum(captioned.values())} held-out images")
    print(f"time       {sum(summary['seconds'].values()):.0f} s")
    print(f"summary    {folder / 'summary.json'}")
    print(f"report     {folder / 'report.html'}")
