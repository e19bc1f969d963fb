"""The five jobs, submitted to a real Ray head with token authentication, on loopback.

The head has fake secrets in its environment. None of them may be in what the jobs, Ray and W&B write.
"""

import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import Table, parquet_files
from pipelines.tiny_world.dataset import write_world
from pipelines.tiny_world.server import serve
from tests.ray_head import BIN, Head, ray_head

pytestmark = pytest.mark.end_to_end

SCENES, BROKEN = 60, 2
SECRETS = {
    name: f"false-{name.lower()}-5f2c9d7e1b"
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
} | {"WANDB_API_KEY": "5f2c9d7e1b" * 4}


@pytest.fixture(scope="module")
def head(forked_python: Path) -> Iterator[Head]:
    options = ["--num-cpus=4", f"--object-store-memory={500 * 2**20}"]
    with ray_head(options, more=SECRETS, python=forked_python) as head:
        yield head


def test_the_five_jobs_one_after_the_other(head: Head, tiny_models: Path, tmp_path: Path) -> None:
    world, steps = tmp_path / "world", ["train.steps=3", "train.num_workers=1", "data.holdout=0.2"]
    steps += ["train.wandb=offline", "train.samples=0"]
    images, pairs, captions = tmp_path / "images", tmp_path / "pairs", tmp_path / "captions"

    def succeed(name: str, *settings: str) -> None:
        done = head.submit(name, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        with open(tmp_path / "console", "a") as console:
            console.write(done.stdout + done.stderr)

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
    for table in (images, captions):
        words = re.sub(r"<[^>]*>", " ", (table / "_report.html").read_text().partition("<main>")[2])
        assert re.search(rf"\bok\s+{SCENES}\b", words), words[:2000]
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    check_secrets({**SECRETS, "the token": token}, tmp_path, head.logs.parents[1])


def check_secrets(secrets: dict[str, str], *folders: Path) -> None:
    """None of the secrets is in any file below the folders."""
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
    names = {f.name for f in files}
    assert {"metrics.jsonl", "console", "_report.html"} <= names  # the jobs' folders
    assert any(name.endswith(".wandb") for name in names)  # W&B's records
    assert any(name.startswith("raylet") for name in names)  # Ray's logs
    written = {f: f.read_bytes() for f in files}
    found = [
        (f.name, name)
        for f, content in written.items()
        for name, secret in secrets.items()
        if secret.encode() in content
    ]
    assert found == []


def test_a_wrong_token_is_rejected(head: Head, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(secrets.token_hex(32))
    stranger = {**head.environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    listing = [str(BIN / "ray"), "job", "list", "--address", head.address]
    assert subprocess.run(listing, env=stranger, capture_output=True).returncode != 0
