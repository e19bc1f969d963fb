"""Kueue's queue: what may run at a time, which is each group at its largest, and their heads."""

from __future__ import annotations

from typing import Any

from cluster.allocatable import BESIDE_HEAD, SIDECAR
from cluster.pools import pool_name

_API = "kueue.x-k8s.io/v1beta2"
# All that a pod of ours requests: a workload with a resource that no group covers is never admitted.
_COVERED = ("cpu", "memory", "ephemeral-storage", "nvidia.com/gpu")


def queues(sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Flavors (kinds of machine), the queue with its quotas, and its entry in our namespace."""
    head, groups = sizes["head"], sizes["groups"]
    flavors, quotas = [], []
    for name, size in {"head": head, **groups}.items():
        flavor = pool_name(name)
        flavors.append(_flavor(flavor, {"vlv-group": name}))
        # As many heads as there are groups: a job has one of each.
        quotas.append(_quota(flavor, size, size.get("max", len(groups))))
    namespace = sizes["site"]["kubernetes_namespace"]
    cluster_queue = {
        "apiVersion": _API,
        "kind": "ClusterQueue",
        "metadata": {"name": "vlv"},
        "spec": {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
            "resourceGroups": [{"coveredResources": list(_COVERED), "flavors": quotas}],
        },
    }
    local = {
        "apiVersion": _API,
        "kind": "LocalQueue",
        "metadata": {"name": "vlv", "namespace": namespace},
        "spec": {"clusterQueue": "vlv"},
    }
    return [*flavors, cluster_queue, local]


def _flavor(name: str, labels: dict[str, str]) -> dict[str, Any]:
    metadata = {"name": name}
    spec = {"nodeLabels": labels}
    return {"apiVersion": _API, "kind": "ResourceFlavor", "metadata": metadata, "spec": spec}


def _quota(name: str, size: dict[str, Any], count: int) -> dict[str, Any]:
    pod = size["pod"]
    beside = [SIDECAR, *([BESIDE_HEAD] if "max" not in size else [])]
    cpus = pod["cpus"] + sum(part["cpus"] for part in beside)
    memory = pod["memory"] + sum(part["memory"] for part in beside)
    amounts = {
        "cpu": f"{count * cpus * 1000:.0f}m",
        "memory": f"{count * memory * 1024:.0f}Mi",
        "ephemeral-storage": f"{count * pod['disk']}Gi",
        "nvidia.com/gpu": count * size.get("gpus", 0),
    }
    return {
        "name": name,
        "resources": [{"name": key, "nominalQuota": amounts[key]} for key in _COVERED],
    }
