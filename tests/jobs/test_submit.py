"""The five jobs, submitted to a real head as a user does: tokens on, everything on loopback."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipelines.storage import Table, parquet_files, read_rows
from pipelines.tiny_world.dataset import write_world
from pipelines.tiny_world.server import serve
from tests.jobs.conftest import ROOT

pytestmark = pytest.mark.end_to_end

BIN = Path(sys.executable).parent
SCENES, BROKEN = 60, 2


@dataclass
class Head:
    """A running head, and the environment in which its command-line tools reach it."""

    address: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="vlv"))  # sockets need a short path
    (folder / "token").write_text(secrets.token_hex(32))
    names = ["port", "dashboard-port", "ray-client-server-port", "metrics-export-port"]
    names += ["dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += ["--dashboard-host=127.0.0.1", "--num-cpus=4", "--disable-usage-stats"]
    command += [f"--object-store-memory={500 * 2**20}", f"--temp-dir={folder / 'ray'}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        listing = [str(BIN / "ray"), "job", "list", "--address", address]
        deadline = time.monotonic() + 240
        while subprocess.run(listing, env=environment, capture_output=True).returncode:
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.5)
        yield Head(address, environment)
    finally:
        # Never `ray stop`: it ends every Ray on the machine.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):  # its turn came while we looked
                    one.kill()
        shutil.rmtree(folder, ignore_errors=True)


Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def submit(head: Head) -> Submit:
    def run(name: str, *settings: str) -> subprocess.CompletedProcess[str]:
        job = ["python", f"jobs/{name}.py", "--config", f"jobs/configs/tiny/{name}.yaml"]
        command = [str(BIN / "ray"), "job", "submit", "--address", head.address]
        command += ["--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--"]
        return subprocess.run(
            [*command, *job, *settings],
            cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    return run


def test_the_five_jobs_one_after_the_other(
    submit: Submit, tiny_models: Path, tmp_path: Path
) -> None:
    world, steps = tmp_path / "world", ["train.steps=3", "train.num_workers=1", "data.holdout=0.2"]
    images, pairs, captions = tmp_path / "images", tmp_path / "pairs", tmp_path / "captions"

    def succeed(name: str, *settings: str) -> None:
        done = submit(name, *settings)
        assert done.returncode == 0, done.stdout + done.stderr

    world.mkdir()
    with serve(world) as web:
        write_world(world, web.base_url, SCENES, num_broken=BROKEN)
        succeed("ingest", f"data.input={world / 'metadata.parquet'}", f"data.output={images}")
    counts = Table(images).counts()
    assert counts["ok"] == SCENES
    assert sum(counts.values()) == SCENES + BROKEN

    run1, run2 = tmp_path / "stage1", tmp_path / "stage2"
    succeed(
        "stage1", f"data.input={images}", f"model.path={tiny_models}", f"run_dir={run1}", *steps
    )
    assert (run1 / "checkpoints/step-00000003/model.safetensors").is_file()
    succeed(
        "stage2", f"data.input={images}", f"data.captions={world / 'teacher.parquet'}",
        f"data.output={pairs}", f"model.path={run1}", f"run_dir={run2}", *steps,
    )  # fmt: skip
    assert Table(pairs).counts() == {"ok": SCENES}

    succeed(
        "recaption", f"data.input={images}", f"model.path={run2}", f"data.output={captions}",
        "data.split=all", "generate.max_new_tokens=8",
    )  # fmt: skip
    keys = [row["key"] for row in read_rows(parquet_files(str(captions)), ["key"])]
    expected = read_rows(parquet_files(str(images)), ["key", "status"])
    assert sorted(keys) == sorted(row["key"] for row in expected if row["status"] == "ok")
    succeed(
        "reconstruct", f"data.input={images}", f"model.path={run1}",
        f"data.output={tmp_path / 'pictures'}", "data.limit=2", "diffusion.num_steps=2",
    )  # fmt: skip
    assert Table(tmp_path / "pictures").counts() == {"ok": 2}


def test_a_relative_output_is_refused(submit: Submit) -> None:
    """It would land in Ray's copy of the working directory and be deleted with it."""
    done = submit("recaption", "data.output=runs/captions")
    assert done.returncode != 0
    assert "error: data.output: 'runs/captions' is relative" in done.stdout + done.stderr


def test_without_the_token_nobody_gets_in(head: Head, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(secrets.token_hex(32))
    stranger = {**head.environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    listing = [str(BIN / "ray"), "job", "list", "--address", head.address]
    assert subprocess.run(listing, env=stranger, capture_output=True).returncode != 0
