"""Kueue's queue: what may run at a time, which is each group at its largest, and their heads."""

from __future__ import annotations

from typing import Any

_API = "kueue.x-k8s.io/v1beta2"
# All that a pod of ours requests: a workload with a resource that no group covers is never admitted.
_COVERED = ("cpu", "memory", "ephemeral-storage", "nvidia.com/gpu")
_SUBMITTER = {"cpu": 1, "memory": 1}


def queues(sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Flavors (kinds of machine), the queue with its quotas, and its entry in our namespace."""
    head, groups = sizes["head"], sizes["groups"]
    # First the heads: a pod without a node selector gets the first flavor that has room, and the
    # workers of a job are more than all heads, so they pass on to the flavor of their machines.
    flavors = [_flavor("vlv-head", {})]
    quotas = [_quota("vlv-head", head, len(groups), _SUBMITTER)]
    for name, group in groups.items():
        flavors.append(_flavor(f"vlv-{name}".replace("_", "-"), {"vlv-group": name}))
        quotas.append(_quota(f"vlv-{name}".replace("_", "-"), group, group["max"], {}))
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
    spec = {"spec": {"nodeLabels": labels}} if labels else {}
    return {"apiVersion": _API, "kind": "ResourceFlavor", "metadata": {"name": name}, **spec}


def _quota(name: str, size: dict[str, Any], count: int, each: dict[str, int]) -> dict[str, Any]:
    amounts = {
        "cpu": count * (size["cpus"] + each.get("cpu", 0)),
        "memory": f"{count * (size['memory'] + each.get('memory', 0))}Gi",
        "ephemeral-storage": f"{count * (size['disk'] * 8 // 10)}Gi",
        "nvidia.com/gpu": count * size.get("gpus", 0),
    }
    return {
        "name": name,
        "resources": [{"name": key, "nominalQuota": amounts[key]} for key in _COVERED],
    }
