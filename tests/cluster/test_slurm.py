"""cluster/slurm.sh with stand-ins for Slurm's commands, Ray and the job: what it starts, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sh"

# Slurm runs the command on a machine: here, on this one.
SRUN = """
echo "srun $*" >> calls
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = """
echo "scontrol $*" >> calls
[ "$1" != show ] || printf 'node1\\nnode2\\nnode3\\n'
"""
# Its head listens, as the machines that join and the job expect; every start runs until it is ended.
RAY = """
echo "token ${#RAY_AUTH_TOKEN} $RAY_AUTH_MODE" >> calls
exec python -c '
import signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: (open("calls", "a").write("ray ended\\n"), sys.exit(1)))
if "--head" in sys.argv:
    port = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--port="))
    listening = socket.create_server(("127.0.0.1", port))
open("started", "a").write("x")
signal.pause()
' "$@"
"""
VLV = """
echo "vlv $*" >> calls
until [ "$(cat started)" = xx ]; do sleep 0.02; done  # Ray was waited for
[ "$1" = fails ] && exit 2
[ "$1" = waits ] || exit 0
trap 'echo "job asked to end" >> calls; exit 143' TERM
touch running
while true; do sleep 0.05; done
"""
RAY_MODULE = """
def init(*_, **__): pass
def nodes(): return [{"Alive": True}] * 3
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    commands = tmp_path / "bin"
    commands.mkdir()
    texts = {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY, "vlv": VLV}
    for name, text in (texts | {"python": f'exec {sys.executable} "$@"'}).items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "ray.py").write_text(RAY_MODULE)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-3]")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    return tmp_path


def run(slurm: Path, *words: str) -> tuple[int, list[str]]:
    ended = subprocess.run(["bash", str(SCRIPT), *words], cwd=slurm, timeout=120)
    return ended.returncode, (slurm / "calls").read_text().splitlines()


def test_ray_is_on_all_machines_of_the_allocation_and_the_job_on_the_first(slurm: Path) -> None:
    status, calls = run(slurm, "stage1", "train.num_workers=24")
    assert status == 0
    starts = [call for call in calls if " ray start " in call]
    assert "--nodelist=node1 " in starts[0]
    assert "--nodes=2 --ntasks=2 --exclude=node1 " in starts[1]
    assert all("--num-cpus=16 --num-gpus=8" in start for start in starts)
    port = 20000 + os.getpid() % 10000
    (job,) = (call for call in calls if call.startswith("vlv "))
    host, found = job.removeprefix("vlv stage1 train.num_workers=24 ray.address=").split(":")
    assert f"--node-ip-address={host} --port={port}" in starts[0]
    assert (f"--address={host}:{port}" in starts[1], int(found)) == (True, port)
    assert calls.count("token 64 token") == 2
    assert calls.count("ray ended") == 2


def test_the_status_is_the_jobs(slurm: Path) -> None:
    status, calls = run(slurm, "fails")
    assert (status, calls.count("ray ended")) == (2, 2)
    assert not any("requeue" in call for call in calls)


def test_the_end_of_the_time_limit_ends_the_job_and_queues_it_again(slurm: Path) -> None:
    started = subprocess.Popen(["bash", str(SCRIPT), "waits"], cwd=slurm)
    while not (slurm / "running").exists():
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == 143
    calls = (slurm / "calls").read_text().splitlines()
    assert calls.index("job asked to end") < calls.index(f"scontrol requeue {os.getpid()}")
    assert calls.count("ray ended") == 2
