"""Trainings in process groups of this file's own, without Ray: gloo and DeepSpeed as they are.

    python -m tests.pipelines.training.worlds RANK WORLD_SIZE PORT SEGMENTS.json

Every segment is a `loop` of `pipelines.training.trainer`; with `copy`, the checkpoint that it goes on
from. One group runs its segments one after the other. A refusal lands in the run's `error-RANK.txt`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[3]


def run_world(world_size: int, segments: list[dict[str, Any]], folder: Path) -> None:
    """Run the segments on `world_size` processes; what they print is the error's text."""
    file = folder / f"segments-{len(list(folder.glob('segments-*')))}.json"
    file.write_text(json.dumps(segments))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.pipelines.training.worlds"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(port), str(file)],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(said)


def main(rank: int, world_size: int, port: int, file: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import deepspeed
    import torch

    from pipelines.training.loop import Worker
    from pipelines.training.trainer import run_worker
    from vlv_model.errors import VLVError

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for segment in json.loads(Path(file).read_text()):
        run_dir = Path(segment["loop"]["config"]["run_dir"])
        if rank == 0:
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            for copied in segment.get("copy", []):
                shutil.copytree(copied, run_dir / "checkpoints" / Path(copied).name)
        torch.distributed.barrier()
        worker = Worker(rank, world_size, torch.device("cpu"))
        try:
            run_worker(segment["loop"], worker, emit=lambda event: None, called_back=set)
        except VLVError as error:
            (run_dir / f"error-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
