"""How far one thing walks through the code: the files that it enters, and the turns to an earlier one.

    python -m benchmarks.scale.walks                    # a development tool; about two minutes

A URL from `jobs/ingest.py` to its row, a caption from `jobs/recaption.py` to its row, and an image from a
rank's start to the end of a training step are followed through the running code, in this process. A file is
entered when one of its functions is called from another file of ours; a turn is a file that calls one which
was entered before it. Each pair of files counts once, so loops count as what a reader of the code sees.
What a child process does (decoders) and what the driver of a training does are not followed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from vlv_model.tiny import write_tiny_models

REPO = Path(__file__).parents[2]
OURS = tuple(f"{REPO / package}{os.sep}" for package in ("jobs", "pipelines", "vlv_model"))


class Walk:
    """The files that are entered while it is open, in order, and the pairs of them that call."""

    def __init__(self, packages: tuple[str, ...] = OURS) -> None:
        self.packages = packages
        self.files: list[str] = []
        self.calls: set[tuple[str, str]] = set()

    def __enter__(self) -> Walk:
        threading.setprofile(self._called)
        sys.setprofile(self._called)
        return self

    def __exit__(self, *raised: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code.co_name == "<module>":
            return
        here = frame.f_code.co_filename
        if not here.startswith(self.packages):
            return
        caller = frame.f_back
        while caller and not caller.f_code.co_filename.startswith(self.packages):
            caller = caller.f_back
        if here not in self.files:
            self.files.append(here)
        if caller and caller.f_code.co_name != "<module>" and caller.f_code.co_filename != here:
            self.calls.add((caller.f_code.co_filename, here))

    def turns(self) -> list[tuple[str, str]]:
        """The calls into a file that was entered before the caller's."""
        place = {file: number for number, file in enumerate(self.files)}
        back = [(at, to) for at, to in self.calls if place[to] < place.get(at, 0)]
        return sorted(back, key=lambda call: (place[call[1]], place[call[0]]))


def ingest(folder: Path) -> Walk:
    from jobs.ingest import run
    from pipelines.cli.config import load
    from pipelines.ingest.config import IngestConfig
    from pipelines.tiny_world.dataset import write_world
    from pipelines.tiny_world.server import serve

    world = folder / "world"
    world.mkdir()
    with serve(world) as web:
        write_world(world, web.base_url, 8)
        given = [f"data.input={world / 'metadata.parquet'}", f"data.output={folder / 'images'}"]
        given += ["download.allow_private=true", "ray.address=in-process", "image.size=64"]
        config = load(IngestConfig, str(REPO / "jobs/configs/tiny/ingest.yaml"), given)
        with Walk() as walk:
            run(config)
    return walk


def recaption(folder: Path) -> Walk:
    from jobs.recaption import run
    from pipelines.cli.config import load
    from pipelines.recaption.config import RecaptionConfig

    given = [f"data.input={folder / 'images'}", f"data.output={folder / 'captions'}"]
    given += [f"model.path={write_captioner(folder / 'models', folder)}", "ray.address=in-process"]
    given += ["data.split=all", "generate.max_new_tokens=4"]
    config = load(RecaptionConfig, str(REPO / "jobs/configs/tiny/recaption.yaml"), given)
    with Walk() as walk:
        run(config)
    return walk


def training(folder: Path) -> Walk:
    import deepspeed
    import torch

    from pipelines.cli.config import dump, load
    from pipelines.storage.tables import parquet_files
    from pipelines.training.config import Stage1Config
    from pipelines.training.job import run_worker
    from pipelines.training.loop import Worker
    from vlv_model.checkpoints.sources import resolve_model

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": "29517", "DS_ACCELERATOR": "cpu"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    run_dir = folder / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    given = [
        f"data.input={folder / 'images'}",
        f"run_dir={run_dir}",
        f"model.path={folder / 'models'}",
    ]
    given += [
        "train.steps=1",
        "train.global_batch_size=1",
        "train.micro_batch_size=1",
        "data.holdout=0.3",
    ]
    given += ["train.num_workers=1", "train.wandb=disabled", "train.samples=0"]
    config = load(Stage1Config, str(REPO / "jobs/configs/tiny/stage1.yaml"), given)
    loop = {
        "stage": "stage1", "config": dump(config), "parent": None,
        "model": resolve_model(folder / "models")[0].model_dump(),
        "files": [str(file) for file in parquet_files(str(folder / "images"))],
    }  # fmt: skip
    worker = Worker(0, 1, torch.device("cpu"), is_first_of_machine=True)
    with Walk() as walk:
        run_worker(loop, worker, emit=lambda event: None, called_back=set)
    return walk


def write_captioner(models: Path, folder: Path) -> Path:
    """A captioner of tiny base models that nothing was taught, as a checkpoint of stage 2."""
    from vlv_model.autoencoder import VLVAutoEncoder
    from vlv_model.captioner import VLVCaptioner
    from vlv_model.checkpoints.sources import resolve_model
    from vlv_model.checkpoints.weights import CheckpointMetadata, save_checkpoint

    common = {"step": 1, "rows_seen": 1, "config": {}, "model": resolve_model(models)[0]}
    about = CheckpointMetadata(stage="stage1", **common)
    stage1 = save_checkpoint(folder / "stage1", VLVAutoEncoder.from_pretrained(models), about)
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True)
    about = CheckpointMetadata(stage="stage2", parent=str(stage1), **common)
    return save_checkpoint(folder / "stage2", captioner, about)


def main() -> None:
    walks: dict[str, Callable[[Path], Walk]] = {
        "a URL": ingest, "a caption": recaption, "an image in a training step": training,
    }  # fmt: skip
    told = {}
    with tempfile.TemporaryDirectory(prefix="vlv-walks-") as folder:
        write_tiny_models(Path(folder) / "models")
        for name, follow in walks.items():
            walk = follow(Path(folder))
            if "--files" in sys.argv:
                names = {file: str(Path(file).relative_to(REPO)) for file in walk.files}
                print(*(f"  {name}" for name in names.values()), sep="\n")
                print(*(f"  {names[at]} -> {names[to]}" for at, to in walk.turns()), sep="\n")
            told[name] = {"files": len(walk.files), "turns": len(walk.turns())}
            print(f"{name}: {told[name]['files']} files, {told[name]['turns']} turns")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
