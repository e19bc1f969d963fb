"""Ray's autoscaler starts the machines that a job requests and stops them afterwards.

The machines are raylets on this machine, with the resources of the launcher's groups except CPUs and
memory. Their GPUs are only counted, so jobs run on CPUs, on the machines of a group.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from cluster.render import read_sizes, rendered
from pipelines.storage.tables import Table
from tests.ray_head import Head, free_ports, ray_head

pytestmark = pytest.mark.end_to_end

CPUS, MEMORY = 2, 100 * 2**20
SIZES = read_sizes()
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
LISTS = [
    "cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands",
    "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
]  # fmt: skip


def scaling(gcs: str) -> dict[str, Any]:
    """The launcher's file for AWS with machines that can be started here."""
    launcher = yaml.safe_load(rendered(SIZES)["launcher/aws.yaml"])
    machines = launcher["available_node_types"]
    types = {"ray.head.default": {**machines.pop("head"), "node_config": {}}}
    for name, machine in machines.items():
        resources = {**machine["resources"], "CPU": CPUS, "object_store_memory": MEMORY}
        # At least two of each: what is shown is that a job of two workers gets two.
        most = max(2, machine["max_workers"])
        types[name] = {**machine, "resources": resources, "node_config": {}, "max_workers": most}
        types[name].pop("idle_timeout_s")
    provider = {"type": "external", "module": PROVIDER, "use_node_id_as_ip": True}
    provider |= {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
    kept = ("cluster_name", "max_workers", "upscaling_speed")
    return {
        **{name: launcher[name] for name in kept},
        **{name: [] for name in LISTS},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "provider": {**provider, "gcs_address": gcs},
        "idle_timeout_minutes": 0.1,
        "auth": {},
        "file_mounts": {},
    }


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    (port,) = free_ports(1)
    config = tmp_path_factory.mktemp("autoscaler") / "config.yaml"
    config.write_text(yaml.safe_dump(scaling(f"127.0.0.1:{port}")))
    options = ["--num-cpus=0", f"--object-store-memory={2 * MEMORY}"]
    options.append(f"--autoscaling-config={config}")
    more = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    # Version 2, the default of `ray up` and KubeRay (Ray 2.50 and newer).
    more |= {"RAY_enable_autoscaler_v2": "1", "RAY_NODE_TYPE_NAME": "ray.head.default"}
    more |= dict.fromkeys(
        ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), FAKE_HEAD_NODE_ID
    )
    with ray_head(options, port, more) as head:
        yield head


# In a process of its own: the mode of authentication is fixed when Ray is loaded.
LOOK = """
import json, sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
for asked in sys.stdin:
    nodes = client.get_all_node_info().values()
    print(json.dumps([[node.state == 0, list(node.resources_total)] for node in nodes]), flush=True)
"""


@dataclass
class Watch:
    """The machines of each group over time."""

    looker: subprocess.Popen[str]

    def started(self) -> Counter[str]:
        """All machines so far, by group."""
        return self._machines(alive=False)

    def running(self) -> Counter[str]:
        return self._machines(alive=True)

    def _machines(self, alive: bool) -> Counter[str]:
        assert self.looker.stdin is not None
        assert self.looker.stdout is not None
        print(file=self.looker.stdin, flush=True)
        found: Counter[str] = Counter()
        for is_alive, resources in json.loads(self.looker.stdout.readline()):
            if is_alive or not alive:
                found.update(set(resources) & set(SIZES["groups"]))
        return found

    def until_idle(self) -> None:
        deadline = time.monotonic() + 120
        while running := self.running():
            assert time.monotonic() < deadline, f"still there: {running}"
            time.sleep(0.5)


@pytest.fixture
def watch(head: Head) -> Iterator[Watch]:
    look = [sys.executable, "-c", LOOK, head.gcs]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(look, env=head.environment, **pipes) as looker:
        yield Watch(looker)
        looker.kill()


TASK = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1, resources={sys.argv[2]: 0.001})
def group():
    return sys.argv[2]

print(ray.get(group.remote()))
"""


def test_a_machine_of_the_group_comes_for_a_task_and_goes_after_it(
    head: Head, watch: Watch
) -> None:
    """The core of each job (pipelines.execution.connection.RayConfig.group); two whole jobs follow below."""
    assert not watch.running()
    asked = [sys.executable, "-c", TASK, head.gcs, "gpu_spot"]
    done = subprocess.run(asked, env=head.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert watch.started() == {"gpu_spot": 1}
    watch.until_idle()


@pytest.mark.faults
def test_machines_come_for_a_job_and_go_after_it(
    head: Head,
    watch: Watch,
    pair_table: Path,
    tiny_models: Path,
    trained_captioner: Path,
    tmp_path: Path,
) -> None:
    assert not watch.running()

    run = tmp_path / "stage1"
    done = head.submit(
        "stage1", f"data.input={pair_table}", f"model.path={tiny_models}", f"run_dir={run}",
        "data.holdout=0.2", "train.steps=2", "train.num_workers=2", "train.global_batch_size=8",
        f"train.cpus_per_worker={CPUS}", "train.wandb=disabled", "train.samples=0", "ray.group=gpu", copied=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for the cluster to start nodes" in done.stdout + done.stderr
    assert (run / "checkpoints/step-00000002/model.safetensors").is_file()
    assert watch.started() == {"gpu": 2}  # a worker on each, and none of another group

    captions = tmp_path / "captions"
    done = head.submit(
        "recaption", f"data.input={pair_table}", f"model.path={trained_captioner}",
        f"data.output={captions}", "data.split=all", "data.rows_per_chunk=16",
        "generate.max_new_tokens=8", "actors.num_actors=2", "ray.group=gpu_spot",
        copied=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert Table(captions).counts() == {"ok": 120}
    assert watch.started()["gpu_spot"] >= 1
    watch.until_idle()
