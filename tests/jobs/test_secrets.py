"""Secrets of the environment stay there: none is found in what a job, its Ray and W&B write."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.conftest import ROOT

pytestmark = pytest.mark.end_to_end

SECRETS = {
    name: f"false-{name.lower()}-5f2c9d7e1b"
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
} | {"WANDB_API_KEY": "5f2c9d7e1b" * 4, "RAY_AUTH_TOKEN": "c0ffee15" * 8}


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vlv"))  # sockets need a short path
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_no_secret_is_written(
    pair_table: Path, tiny_models: Path, tmp_path: Path, ray_folder: Path
) -> None:
    run = tmp_path / "run"
    environment = {
        **os.environ,
        **SECRETS,
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(ray_folder),
        "PYTHONPATH": str(ROOT),
        "WANDB_DIR": str(tmp_path),
    }
    environment.pop("AWS_ENDPOINT_URL", None)
    command = [sys.executable, "jobs/stage1.py", "--config", "jobs/configs/tiny/stage1.yaml"]
    command += [f"data.input={pair_table}", f"model.path={tiny_models}", f"run_dir={run}"]
    command += [
        "train.steps=2",
        "train.num_workers=1",
        "train.wandb=offline",
        "train.samples=0",
        "ray.num_cpus=2",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "console").write_text(done.stdout + done.stderr)
    files = [f for folder in (tmp_path, ray_folder) for f in folder.rglob("*") if f.is_file()]
    names = {f.name for f in files}
    assert "metrics.jsonl" in names  # the run folder,
    assert any(name.endswith(".wandb") for name in names)  # W&B's records,
    assert any(name.startswith("raylet") for name in names)  # and Ray's logs were looked at
    found = [
        (f.name, name)
        for f in files
        for name, secret in SECRETS.items()
        if secret.encode() in f.read_bytes()
    ]
    assert found == []
