"""A stage-1 training over two machines of a local cluster, one of which is called back and goes.

    python -m tests.pipelines.training.lost_node SETTING=VALUE …

A process of its own, since the cluster needs another Ray than the other tests'. Prints the number of
the step whose checkpoint answered the notice.
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
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",  # how long the lost machine is waited for
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


NOTICED = b"PreemptionWatcher: preemption detected"  # by Ray Train, which then tells the ranks


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
    answered: list[int] = []
    loss = threading.Thread(
        target=lose, args=(cluster, node, Path(config.run_dir), config.train.steps, answered)
    )
    loss.start()
    train(config)
    loss.join()
    ray.shutdown()
    cluster.shutdown()
    print(answered[0])


def lose(cluster: Any, node: Any, run_dir: Path, steps: int, answered: list[int]) -> None:
    """Give notice of the machine, wait for the checkpoint that answers it, and take it away."""
    until(lambda: told(run_dir, "step"))
    ranks = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in line(p)]
    for rank in ranks:  # so that the notice comes before the few steps are done
        rank.suspend()
    call_back(cluster.address, node.node_id)
    logs = Path(cluster.head_node.get_logs_dir_path())
    until(lambda: any(NOTICED in file.read_bytes() for file in logs.rglob("worker-*.err")))
    for rank in ranks:
        rank.resume()
    until(lambda: told(run_dir, "checkpoint"))
    answered += told(run_dir, "checkpoint")
    raylet = node.all_processes["raylet"][0].process.pid
    for process in psutil.Process(raylet).children(recursive=True):  # they go with their machine
        process.send_signal(signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def call_back(address: str, node_id: str) -> None:
    """What an autoscaler tells Ray when the cloud takes a spot machine back in two minutes."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = time.time_ns() // 10**6 + 120_000
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "spot", deadline)
    if not accepted:
        raise RuntimeError(why)


def told(run_dir: Path, event: str) -> list[int]:
    from pipelines.training.metrics import read_metrics

    return [e["step"] for e in read_metrics(run_dir) if e["event"] == event]


def line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def until(true: Any) -> None:
    deadline = time.monotonic() + 300  # a start takes long where other jobs run beside it
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


if __name__ == "__main__":
    main()
