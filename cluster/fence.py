"""The fence of our pods on Kubernetes: namespace, accounts, who may talk to whom, what a drain waits for."""

from __future__ import annotations

from typing import Any

from cluster.monitoring import AUTOSCALER_PORT, DASHBOARD_PORT, METRICS_PORT

Document = dict[str, Any]

LABEL = {"app.kubernetes.io/part-of": "vlv"}
"""The label of all our objects and pods, by which the network policies select them."""


def named(api: str, kind: str, name: str, sizes: dict[str, Any], spec: Document) -> Document:
    """An object of Kubernetes in our namespace, with our label."""
    metadata = {
        "name": name,
        "namespace": sizes["site"]["kubernetes_namespace"],
        "labels": dict(LABEL),
    }
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}


def fence(sizes: dict[str, Any]) -> list[Document]:
    """Namespace, account of the workers, who may talk to whom, and what a drain has to wait for."""
    site = sizes["site"]
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": site["kubernetes_namespace"],
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        },
    }
    accounts = []
    for name in ("vlv-head", "vlv-worker"):
        account = named("v1", "ServiceAccount", name, sizes, {})
        del account["spec"]
        account["metadata"]["annotations"] = dict(site["kubernetes_identity"])
        account["automountServiceAccountToken"] = name == "vlv-head"  # it asks for pods
        accounts.append(account)
    ours = {"podSelector": {"matchLabels": dict(LABEL)}}

    def of_namespace(name: str) -> Document:
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}

    def ports(*numbers: int, protocol: str = "TCP") -> list[Document]:
        return [{"protocol": protocol, "port": number} for number in numbers]

    def addresses(*names: str) -> list[Document]:
        return [{"ipBlock": {"cidr": f"{name}/32"}} for name in names]

    incoming = {
        "podSelector": {"matchLabels": dict(LABEL)},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [ours]},
            {"from": [of_namespace(site["operator_namespace"])], "ports": ports(8265, 52365)},
            {
                "from": [of_namespace(site["monitoring_namespace"])],
                "ports": ports(METRICS_PORT, AUTOSCALER_PORT, DASHBOARD_PORT),
            },
        ],
    }
    # Workers open strangers' URLs: not those of this network, nor of the machine's metadata.
    private = ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"]
    outgoing = {
        "podSelector": {"matchLabels": {**LABEL, "app.kubernetes.io/component": "worker"}},
        "policyTypes": ["Egress"],
        "egress": [
            {"to": [ours]},
            {
                # The last two: a cache on the node, and Google's.
                "to": [of_namespace("kube-system"), *addresses("169.254.20.10", "169.254.169.254")],
                "ports": ports(53) + ports(53, protocol="UDP"),
            },
            *(
                {
                    "to": addresses(place.rpartition(":")[0]),
                    "ports": ports(int(place.rpartition(":")[2])),
                }
                for place in site["kubernetes_private_services"]
            ),
            {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": private}}]},
        ],
    }
    undisturbed = {
        # More than there are: 0 that may go. `maxUnavailable` is an error for pods of a RayCluster,
        # which has no scale that Kubernetes could ask for (kuberay#2662).
        "minAvailable": 1000,
        "selector": {"matchLabels": {**LABEL, "app.kubernetes.io/component": "head"}},
    }
    return [
        namespace,
        *accounts,
        named("networking.k8s.io/v1", "NetworkPolicy", "vlv-incoming", sizes, incoming),
        named("networking.k8s.io/v1", "NetworkPolicy", "vlv-outgoing", sizes, outgoing),
        named("policy/v1", "PodDisruptionBudget", "vlv-head", sizes, undisturbed),
    ]
