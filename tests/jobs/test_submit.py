"""Jobs submitted to a real Ray head with token authentication, on loopback.

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
from pipelines.training.caption_index import CaptionIndex
from tests.ray_head import BIN, Head, ray_head

pytestmark = pytest.mark.end_to_end

SCENES, BROKEN = 60, 2
STEPS = [
    "train.steps=3", "train.num_workers=1", "data.holdout=0.2", "train.wandb=offline", "train.samples=0",
]  # fmt: skip
SECRETS = {
    name: f"false-{name.lower()}-5f2c9d7e1b"
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
} | {"WANDB_API_KEY": "5f2c9d7e1b" * 4}


@pytest.fixture(scope="module")
def head(forked_python: Path) -> Iterator[Head]:
    options = ["--num-cpus=4", f"--object-store-memory={500 * 2**20}"]
    with ray_head(options, more=SECRETS, python=forked_python) as head:
        yield head


class Folder:
    """What jobs of one head write below one folder, the console's lines included."""

    def __init__(self, head: Head, models: Path, folder: Path) -> None:
        self.head, self.models, self.folder = head, models, folder
        self.images, self.run1 = folder / "images", folder / "stage1"

    def submit(self, name: str, *settings: str) -> None:
        done = self.head.submit(name, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        with open(self.folder / "console", "a") as console:
            console.write(done.stdout + done.stderr)

    def ingest_and_train(self) -> None:
        world = self.folder / "world"
        world.mkdir()
        with serve(world) as web:
            write_world(world, web.base_url, SCENES, num_broken=BROKEN)
            listed = f"data.input={world / 'metadata.parquet'}"
            self.submit("ingest", listed, f"data.output={self.images}")
        counts = Table(self.images).counts()
        assert counts["ok"] == SCENES
        assert sum(counts.values()) == SCENES + BROKEN
        model = f"model.path={self.models}"
        self.submit("stage1", f"data.input={self.images}", model, f"run_dir={self.run1}", *STEPS)
        assert (self.run1 / "checkpoints/step-00000003/model.safetensors").is_file()

    def check(self, *tables: Path) -> None:
        """Each report has its rows, and no secret is in any file."""
        for table in tables:
            page = (table / "_report.html").read_text().partition("<main>")[2]
            words = re.sub(r"<[^>]*>", " ", page)
            assert re.search(rf"\bok\s+{SCENES}\b", words), words[:2000]
        token = Path(self.head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        check_secrets({**SECRETS, "the token": token}, self.folder, self.head.logs.parents[1])


def test_ingest_and_stage_1_are_submitted(head: Head, tiny_models: Path, tmp_path: Path) -> None:
    folder = Folder(head, tiny_models, tmp_path)
    folder.ingest_and_train()
    folder.check(folder.images)


@pytest.mark.faults
def test_the_five_jobs_one_after_the_other(head: Head, tiny_models: Path, tmp_path: Path) -> None:
    folder = Folder(head, tiny_models, tmp_path)
    folder.ingest_and_train()
    images, run1, run2 = folder.images, folder.run1, tmp_path / "stage2"
    captions = tmp_path / "captions"
    folder.submit(
        "stage2", f"data.input={images}", f"data.captions={tmp_path / 'world/teacher.parquet'}",
        f"model.path={run1}", f"run_dir={run2}", *STEPS,
    )  # fmt: skip
    assert CaptionIndex.open(run2 / "captions").about()["counts"]["images"] == SCENES

    folder.submit(
        "recaption", f"data.input={images}", f"model.path={run2}", f"data.output={captions}",
        "data.split=all", "generate.max_new_tokens=8",
    )  # fmt: skip
    keys = [row["key"] for row in read_rows(parquet_files(str(captions)), ["key"])]
    expected = read_rows(parquet_files(str(images)), ["key", "status"])
    assert sorted(keys) == sorted(row["key"] for row in expected if row["status"] == "ok")
    folder.submit(
        "reconstruct", f"data.input={images}", f"model.path={run1}",
        f"data.output={tmp_path / 'pictures'}", "data.limit=2", "diffusion.num_steps=2",
    )  # fmt: skip
    assert Table(tmp_path / "pictures").counts() == {"ok": 2}
    folder.check(images, captions)


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
