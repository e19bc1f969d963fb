"""A stage-1 training on two nodes of a local cluster, one of which is preempted and lost.

    python -m tests.pipelines.training.lost_node SETTING=VALUE …

Runs in its own process, since it needs its own Ray cluster. Prints the step of the checkpoint saved
after the preemption notice.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

os.environ |= {
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",  # wait for the lost node
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


NOTICED = b"PreemptionWatcher: preemption detected"  # Ray Train's log line


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    from pipelines.cli.config import load
    from pipelines.training.config import Stage1Config
    from pipelines.training.job import train

    health = {"health_check_initial_delay_ms": 0, "health_check_failure_threshold": 12}
    health |= {"health_check_period_ms": 500, "health_check_timeout_ms": 20_000}
    head = {"num_cpus": 1, "object_store_memory": 10**8, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": health})
    node = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    config = load(Stage1Config, None, [*sys.argv[1:], f"ray.address={cluster.address}"])
    saved: list[int] = []
    loss = threading.Thread(
        target=lose, args=(cluster, node, Path(config.run_dir), config.train.steps, saved)
    )
    loss.start()
    train(config)
    loss.join()
    ray.shutdown()
    cluster.shutdown()
    print(saved[0])


def lose(cluster: Any, node: Any, run_dir: Path, steps: int, saved: list[int]) -> None:
    """Send a preemption notice for the node, wait for the checkpoint, then kill the node."""
    until(lambda: steps_of(run_dir, "step"))
    ranks = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in line(p)]
    for rank in ranks:  # so that the notice arrives before training ends
        rank.suspend()
    preempt(cluster.address, node.node_id)
    logs = Path(cluster.head_node.get_logs_dir_path())
    until(lambda: any(NOTICED in file.read_bytes() for file in logs.rglob("worker-*.err")))
    for rank in ranks:
        rank.resume()
    until(lambda: steps_of(run_dir, "checkpoint"))
    saved += steps_of(run_dir, "checkpoint")
    raylet = node.all_processes["raylet"][0].process.pid
    for process in psutil.Process(raylet).children(recursive=True):
        process.send_signal(signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def preempt(address: str, node_id: str) -> None:
    """Drain the node as an autoscaler does on a spot notice of two minutes."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = time.time_ns() // 10**6 + 120_000
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "spot", deadline)
    if not accepted:
        raise RuntimeError(why)


def steps_of(run_dir: Path, event: str) -> list[int]:
    from pipelines.training.metrics import read_metrics

    return [e["step"] for e in read_metrics(run_dir) if e["event"] == event]


def line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def until(true: Any) -> None:
    deadline = time.monotonic() + 300  # starting is slow while other jobs run
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


if __name__ == "__main__":
    main()
