"""A Ray head of its own for a test, as a user starts one: tokens on, everything on loopback."""

from __future__ import annotations

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
_PORTS = (
    "port", "dashboard-port", "ray-client-server-port", "metrics-export-port",
    "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
)  # fmt: skip

START = """
import os, sys
sys.executable = os.environ.pop("WORKERS_PYTHON")  # which Ray starts its workers with
from ray.scripts.scripts import main
sys.argv[0] = "ray"
main()
"""


@dataclass
class Head:
    """A running head, and the environment in which its command-line tools reach it."""

    address: str  # of the dashboard and the job API
    gcs: str
    environment: dict[str, str]
    logs: Path

    def submit(
        self, name: str, *settings: str, copied: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a job with its tiny configuration, as the README has it.

        Without `copied` the code is run where it lies, as from an image: machines that share a
        disk share Ray's copy of the working directory too, which was found gone after one had left.
        """
        here = "" if copied else f"{ROOT}/"
        job = [
            "python",
            f"{here}jobs/{name}.py",
            "--config",
            f"{here}jobs/configs/tiny/{name}.yaml",
        ]
        command = [str(BIN / "ray"), "job", "submit", "--address", self.address]
        command += ["--working-dir", "."] if copied else []
        command += ["--runtime-env", "cluster/runtime_env.yaml", "--"]
        for _ in range(3):
            done = subprocess.run(
                [*command, *job, *settings],
                cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=1200,
            )  # fmt: skip
            # On a busy machine Ray's dashboard waits too short for its own agent.
            if "Request failed with status code 504" not in done.stderr:
                break
        return done


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextlib.contextmanager
def ray_head(
    options: Sequence[str],
    port: int | None = None,
    more: dict[str, str] | None = None,
    python: Path | None = None,
) -> Iterator[Head]:
    """`ray start --head` with `options`, its GCS at `port`, `more` in its environment; until it
    answers, and gone afterwards. Its workers and the jobs' drivers are processes of `python`."""
    folder = Path(tempfile.mkdtemp(prefix="vlv"))  # sockets need a short path
    (folder / "token").write_text(secrets.token_hex(32))
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    ports["port"] = port or ports["port"]
    environment = {
        **os.environ,
        "PATH": f"{(python or Path(sys.executable)).parent}:{BIN}:{os.environ['PATH']}",
        "WORKERS_PYTHON": str(python or sys.executable),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        **(more or {}),
    }
    command = [
        sys.executable,
        "-c",
        START,
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
    ]
    command += ["--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    command += [f"--temp-dir={folder / 'ray'}", *options]
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
        logs = folder / "ray/session_latest/logs"
        yield Head(address, f"127.0.0.1:{ports['port']}", environment, logs)
    finally:
        # Never `ray stop`: it ends every Ray on the machine.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):  # its turn came while we looked
                    one.kill()
        for one in psutil.process_iter(["cmdline"]):  # nodes that a provider started
            if any(str(folder) in word for word in one.info["cmdline"] or ()):
                with contextlib.suppress(psutil.Error):
                    one.kill()
        shutil.rmtree(folder, ignore_errors=True)
