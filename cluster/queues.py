"""Renders Kueue's queue. Its quota is every group at its maximum size, and one head per group."""

from __future__ import annotations

from typing import Any

from cluster.allocatable import HEAD_SIDECARS, SIDECAR
from cluster.pools import pool_name

_API = "kueue.x-k8s.io/v1beta2"
# All resources that our pods request: Kueue never admits a workload with an uncovered resource.
_COVERED = ("cpu", "memory", "ephemeral-storage", "nvidia.com/gpu")


def queues(sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Flavors (kinds of machine), the cluster queue with its quotas, and our local queue."""
    head, groups = sizes["head"], sizes["groups"]
    flavors, quotas = [], []
    for name, size in {"head": head, **groups}.items():
        flavor = pool_name(name)
        flavors.append(_flavor(flavor, {"vlv-group": name}))
        # One head per group: each job has its own head.
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
    sidecars = [SIDECAR, *([HEAD_SIDECARS] if "max" not in size else [])]
    cpus = pod["cpus"] + sum(part["cpus"] for part in sidecars)
    memory = pod["memory"] + sum(part["memory"] for part in sidecars)
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
