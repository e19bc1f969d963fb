"""Where a disturbed table is stored: a local folder, a small disk, an S3 server, a cluster's folder.

Each can inject its own fault: `inject` causes it and repairs it after a while.
"""

from __future__ import annotations

import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.faults.counting import find_damage
from benchmarks.faults.kinds import FlakyProxy, fill_disk, small_disk, wait_until


class Target:
    """A folder of the local disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = str(folder)
        self.environment: dict[str, str] = {}

    def commits(self) -> set[Any]:
        """The present commits, each with its time of writing."""
        found = set()
        for file in (self.folder / "_commits").glob("*.json"):
            with suppress(OSError):
                found.add((file.name, file.stat().st_mtime_ns))
        return found

    def find_damage(self) -> str | None:
        """A problem that a reader would see now, or None."""
        return find_damage(self.folder)

    def local(self) -> Path:
        """The table as a local folder."""
        return self.folder

    def inject(self, rng: random.Random, going: Callable[[], bool]) -> None:
        """Cause the fault, and repair it after a while or when the job has ended."""
        raise NotImplementedError


class SmallDisk(Target):
    def inject(self, rng: random.Random, going: Callable[[], bool]) -> None:
        ballast = fill_disk(self.folder.parent)
        wait_until(lambda: not going(), 60)
        ballast.unlink()


@contextmanager
def disk(folder: Path) -> Iterator[Target]:
    with small_disk(folder / "disk", megabytes=256):
        yield SmallDisk(folder / "disk" / "table")


class Store(Target):
    """A bucket on moto's server, behind a proxy that can fail."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(folder / "copy")
        import s3fs

        self.proxy = FlakyProxy(port)
        bucket = f"chaos-{uuid.uuid4().hex[:8]}"
        self.table = f"s3://{bucket}/table"
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        self.environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}", **keys}
        self.environment["AWS_DEFAULT_REGION"] = "us-east-1"
        self.store = s3fs.S3FileSystem(
            key="test",
            secret="test",
            endpoint_url=f"http://127.0.0.1:{port}",
            use_listings_cache=False,
        )
        self.path = f"{bucket}/table"
        self.store.mkdir(bucket)

    def commits(self) -> set[Any]:
        try:
            found = self.store.ls(f"{self.path}/_commits", detail=True)
        except FileNotFoundError:
            return set()
        return {(one["name"], one["LastModified"]) for one in found}

    def find_damage(self) -> str | None:
        return find_damage(self.local())

    def local(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        if self.store.exists(self.path):
            self.store.get(self.path + "/", str(self.folder) + "/", recursive=True)
        return self.folder

    def inject(self, rng: random.Random, going: Callable[[], bool]) -> None:
        self.proxy.turn(rng.choice(["refuses", "hangs"]))
        wait_until(lambda: not going(), rng.uniform(2, 90))
        self.proxy.turn("passes")


@contextmanager
def store(folder: Path) -> Iterator[Target]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield Store(folder, server.get_host_and_port()[1])
    finally:
        server.stop()


class ClusterTarget(Target):
    """A folder shared by a cluster of three machines: the head has no CPUs, the others `cpus` each."""

    cpus = 2

    def __init__(self, folder: Path, cluster: Any) -> None:
        super().__init__(folder)
        self.cluster = cluster
        self.nodes = [self._add() for _ in "ab"]
        self.environment = {"RAY_ADDRESS": cluster.address}

    def inject(self, rng: random.Random, going: Callable[[], bool]) -> None:
        lost = self.nodes.pop(rng.randrange(len(self.nodes)))
        self.cluster.remove_node(lost, allow_graceful=False)
        time.sleep(rng.uniform(0, 5))
        self.nodes.append(self._add())

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=self.cpus, object_store_memory=3 * 10**8)


@contextmanager
def node(
    folder: Path, target: Callable[[Path, Any], ClusterTarget] = ClusterTarget
) -> Iterator[Target]:
    from ray.cluster_utils import Cluster

    health = {"health_check_initial_delay_ms": 0, "health_check_failure_threshold": 3}
    health |= {"health_check_period_ms": 500, "health_check_timeout_ms": 500}
    # With more threads, a rank with two CPUs would add floats in another order than the undisturbed run.
    os.environ["OMP_NUM_THREADS"] = "1"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": 3 * 10**8,
            "_system_config": health,
            "include_dashboard": False,
        },
    )
    try:
        yield target(folder / "table", cluster)
    finally:
        cluster.shutdown()


TARGETS: dict[str, Callable[[Path], AbstractContextManager[Target]]] = {
    "disk": disk,
    "store": store,
    "node": node,
}
