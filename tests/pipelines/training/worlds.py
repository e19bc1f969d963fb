"""Runs trainings in gloo process groups with DeepSpeed, without Ray.

    python -m tests.pipelines.training.worlds GROUPS

A group is a world size and a list of segments, which run one after the other. A segment is a TrainingTask,
with `copy`, the checkpoint it continues from. A VLVError is written to the
run's `error-RANK.txt`. Ranks are forked from one process, so that the slow imports happen once.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.images.random_access import RowIndex
from pipelines.training.config import Stage1Config, Stage2Config
from pipelines.training.run_captions import captions_of_run
from pipelines.training.worker import TrainingTask
from vlv_model.checkpoints.sources import resolve_model

REPO = Path(__file__).parents[3]

Group = tuple[int, list[dict[str, Any]]]


def segment(
    config: Stage1Config | Stage2Config,
    models: Path,
    after: Path | None = None,
    parent: Path | None = None,
    damaged: str = "",
    listed: Sequence[Path] = (),
) -> dict[str, Any]:
    """A training from the start, or `after` a checkpoint; stage 2 starts from the checkpoint `parent`.

    `listed`: a listing of the images, whose captions are joined already; default: Parquet files. `damaged`
    names a file of the copied checkpoint in which a bit is flipped.
    """
    found = listed or sorted(Path(config.data.input).glob("*.parquet"))
    if isinstance(config, Stage2Config) and not listed:  # as the driver does
        captions_of_run(config, found, RowIndex.open(found))
    files = [str(file) for file in found]
    decode = config.data.decoding() if listed else None
    task = TrainingTask(config, resolve_model(models)[0], parent, files, decode)
    return {"task": task, "copy": [str(after)] if after else [], "damaged": damaged}


def run_worlds(groups: list[Group], folder: Path, python: Path) -> None:
    """Run the groups, one after the other, with `python`; a failure shows their output."""
    (folder / "groups").write_bytes(pickle.dumps(groups))
    command = [python, "-m", "tests.pipelines.training.worlds", folder / "groups"]
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    settings["PLAIN_PYTHON"] = sys.executable
    ended = subprocess.run(
        command, cwd=REPO, env=os.environ | settings, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def main(file: str) -> int:
    import deepspeed

    import pipelines.training.loop  # noqa: F401  imported before the fork

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for world_size, segments in pickle.loads(Path(file).read_bytes()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        ranks = [fork(rank, world_size, segments) for rank in range(world_size)]
        ends = [os.waitpid(rank, 0)[1] for rank in ranks]
        if any(ends):
            return 1
    return 0


def fork(rank: int, world_size: int, segments: list[dict[str, Any]]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        run(rank, world_size, segments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run(rank: int, world_size: int, segments: list[dict[str, Any]]) -> None:
    import deepspeed
    import torch

    from pipelines.training.loop import Worker
    from pipelines.training.worker import run_worker
    from vlv_model.errors import VLVError

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    sys.executable = os.environ["PLAIN_PYTHON"]  # decoders get more streams than three
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for segment in segments:
        run_dir = Path(segment["task"].config.run_dir)
        if rank == 0:
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            for copied in segment["copy"]:
                begun = shutil.copytree(copied, run_dir / "checkpoints" / Path(copied).name)
                if segment["damaged"]:
                    turn_a_bit(begun / segment["damaged"])
        torch.distributed.barrier()
        worker = Worker(rank, world_size, torch.device("cpu"), is_first_on_machine=rank == 0)
        try:
            run_worker(segment["task"], worker, emit=lambda event: None, preempted=set)
        except VLVError as error:
            (run_dir / f"error-{rank}.txt").write_text(str(error))


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
