"""Fixtures that several packages' tests share: one Ray, one set of tiny models, one table."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from pipelines.execution.cluster import Cluster
from pipelines.execution.connection import RayConfig, ray_session
from tests.fork_server import fork_server

# What starts in the background (nohup, a CI) ignores these, and so would all jobs that tests start.
for number, handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Seconds of a busy machine are no verdict upon an example.
settings.register_profile("vlv", deadline=None)
settings.load_profile("vlv")

# Nothing in a test may wait for a hub or for Weights & Biases' servers.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, upon tiny models
for variable in ("RAY_ADDRESS", "WANDB_API_KEY"):
    os.environ.pop(variable, None)

# Models some ten times smaller than the tiny ones, for trainings of which DeepSpeed's own work is most.
SMALLEST = Path(__file__).parent / "compatibility/made-2026-11/models"


# Groups of tests that share what takes long to start, those that take longest first. A file is a group
# of its own where it is not named here. What shares the Ray of a process is in two groups, or each of the
# processes would start one.
GROUPS = {
    "training": [
        "pipelines/training/test_train.py", "pipelines/training/test_run_rows.py",
        "compatibility/test_made.py",
    ],
    "demo": ["jobs/test_demo.py"],
    "submit": ["jobs/test_submit.py"],
    "resume": ["pipelines/training/test_resume.py"],
    "actors": [
        "pipelines/execution/test_quarantine.py", "jobs/test_worker_errors.py", "pipelines/training/test_data.py",
        "pipelines/training/test_samples.py", "benchmarks/test_recaption_benchmark.py",
        "pipelines/precompute/test_precompute.py", "pipelines/recaption/test_publish.py",
        "pipelines/ingest/test_duplicates.py", "pipelines/images/test_card.py", "pipelines/execution/test_telemetry.py",
        "pipelines/ingest/test_ingest.py", "pipelines/ingest/test_refusals.py",
    ],
    "machines": ["pipelines/execution/test_chunks.py", "cluster/test_autoscaler.py"],
    "connection": ["pipelines/execution/test_connection.py"],
}  # fmt: skip
GROUP_OF = {file: group for group, files in GROUPS.items() for file in files}


def group_of(nodeid: str) -> str:
    """The group of a test, by its file."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return GROUP_OF.get(file, file)


class GroupScheduling(LoadScopeScheduling):
    """Gives each process a group at a time."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling | None:
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the groups of GROUPS run first, in their order; what needs a Ray is no fast test."""
    places = {group: number for number, group in enumerate(GROUPS)}
    items.sort(key=lambda item: places.get(group_of(item.nodeid), len(places)))
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.end_to_end)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server in this process; the environment leads to it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    yield os.environ["AWS_ENDPOINT_URL"]
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@pytest.fixture
def bucket(s3_server: str) -> str:
    """`s3://…` of a new, empty bucket."""
    import s3fs

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def forked_python() -> Iterator[Path]:
    """A stand-in for the interpreter whose processes have torch and transformers loaded."""
    with tempfile.TemporaryDirectory(prefix="vlv") as folder, fork_server(Path(folder)) as python:
        yield python


@pytest.fixture(scope="session")
def ray_local(s3_server: str, forked_python: Path) -> Iterator[Cluster]:
    """A Ray of this session's own, with 2 logical CPUs; its workers know the S3 server."""
    import ray

    assert not ray.is_initialized()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(forked_python))  # which Ray starts its workers with
        session = ray_session(RayConfig(num_cpus=2, object_store_gb=0.5))
        cluster = session.__enter__()
    yield cluster
    session.__exit__(None, None, None)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `../shared` beside the repository; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: this test reads its files")
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny base models."""
    from vlv_model.tiny import write_tiny_models

    return Path(write_tiny_models(tmp_path_factory.mktemp("tiny") / "models"))


@pytest.fixture(scope="session")
def trained_captioner(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 checkpoint whose weights were moved in place of training."""
    from tests.vlv_model.made_checkpoints import metadata, shift
    from vlv_model.autoencoder import VLVAutoEncoder
    from vlv_model.captioner import VLVCaptioner
    from vlv_model.checkpoints.weights import save_checkpoint

    home = tmp_path_factory.mktemp("captioner")
    stage1 = home / "stage1"
    save_checkpoint(stage1, VLVAutoEncoder.from_pretrained(tiny_models), metadata(tiny_models))
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True)
    shift(captioner)
    about = metadata(tiny_models, "stage2", parent=str(stage1))
    return save_checkpoint(home / "stage2", captioner, about)


@pytest.fixture(scope="session")
def pair_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 drawn scenes with their captions, and two rows that failed, as Parquet of our layout."""
    from pipelines.images.rows import PAIR_ROW, url_key
    from pipelines.tiny_world import scenes

    rows = []
    for number, scene in enumerate(scenes.sample(seed=1, n=120)):
        buffer = io.BytesIO()
        scenes.draw(scene, number).save(buffer, "PNG")
        url = f"http://tiny.world/{number}.png"
        image = {"bytes": buffer.getvalue(), "path": None}
        found = {"image": image, "status": "ok", "caption": scenes.caption(scene)}
        rows.append({"key": url_key(url), "url": url, **found})
    for status in ("download:timeout", "decode:truncated"):
        rows.append({"key": url_key(status), "url": status, "status": status, "error": "why"})
    folder = tmp_path_factory.mktemp("pairs")
    table = pa.Table.from_pylist(rows, schema=PAIR_ROW)
    for part in range(2):
        pq.write_table(table.slice(part * 61, 61), folder / f"{part}.parquet", row_group_size=16)
    return folder
