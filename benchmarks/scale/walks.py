"""Count how many files a reader visits to follow one item through the code, and how often back.

    python -m benchmarks.scale.walks [--files]          # a development tool; about two minutes

Traces a URL from `jobs/ingest.py` to its row, a caption from `jobs/recaption.py` to its row, and an image
from a rank's start to the end of a training step, in this process. A file is visited when another of our
files calls one of its functions. A turn is a pair of files of which the later visited one calls the
earlier one. Child processes (decoders) and a training's driver are not traced.
"""

from __future__ import annotations

import json
import os
import socket
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
    """Records visited files in order, and the pairs of files with a call between them."""

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
        callee = frame.f_code.co_filename
        if not callee.startswith(self.packages):
            return
        caller = frame.f_back
        while caller and not caller.f_code.co_filename.startswith(self.packages):
            caller = caller.f_back
        if callee not in self.files:
            self.files.append(callee)
        if caller and caller.f_code.co_name != "<module>" and caller.f_code.co_filename != callee:
            self.calls.add((caller.f_code.co_filename, callee))

    def turns(self) -> list[tuple[str, str]]:
        """The calls into a file that was visited before the caller's."""
        order = {file: number for number, file in enumerate(self.files)}
        back = [(at, to) for at, to in self.calls if order[to] < order.get(at, 0)]
        return sorted(back, key=lambda call: (order[call[1]], order[call[0]]))


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

    from pipelines.cli.config import load
    from pipelines.storage.tables import parquet_files
    from pipelines.training.config import Stage1Config
    from pipelines.training.loop import Worker
    from pipelines.training.worker import TrainingTask, run_worker
    from vlv_model.checkpoints.sources import resolve_model

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_PORT": str(free.getsockname()[1]), "DS_ACCELERATOR": "cpu"}
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
    files = [str(file) for file in parquet_files(str(folder / "images"))]
    task = TrainingTask(config, resolve_model(folder / "models")[0], None, files)
    worker = Worker(0, 1, torch.device("cpu"), is_first_on_machine=True)
    with Walk() as walk:
        run_worker(task, worker, emit=lambda event: None, preempted=set)
    return walk


def write_captioner(models: Path, folder: Path) -> Path:
    """An untrained tiny captioner, as a stage-2 checkpoint."""
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
    counts = {}
    with tempfile.TemporaryDirectory(prefix="vlv-walks-") as folder:
        write_tiny_models(Path(folder) / "models")
        for name, follow in walks.items():
            walk = follow(Path(folder))
            if "--files" in sys.argv:
                names = {file: str(Path(file).relative_to(REPO)) for file in walk.files}
                print(*(f"  {name}" for name in names.values()), sep="\n")
                print(*(f"  {names[at]} -> {names[to]}" for at, to in walk.turns()), sep="\n")
            counts[name] = {"files": len(walk.files), "turns": len(walk.turns())}
            print(f"{name}: {counts[name]['files']} files, {counts[name]['turns']} turns")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
