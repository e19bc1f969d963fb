"""Renders our Kubernetes namespace: service accounts, network policies, disruption budget."""

from __future__ import annotations

from typing import Any

from cluster.monitoring import AUTOSCALER_PORT, DASHBOARD_PORT, METRICS_PORT

Document = dict[str, Any]

LABEL = {"app.kubernetes.io/part-of": "vlv"}
"""Label of all our objects and pods; the network policies select by it."""


def named(api: str, kind: str, name: str, sizes: dict[str, Any], spec: Document) -> Document:
    """A Kubernetes object in our namespace, with our label."""
    metadata = {
        "name": name,
        "namespace": sizes["site"]["kubernetes_namespace"],
        "labels": dict(LABEL),
    }
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}


def namespace_objects(sizes: dict[str, Any]) -> list[Document]:
    """Namespace, service accounts, network policies and the head's disruption budget."""
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
        account["automountServiceAccountToken"] = name == "vlv-head"  # its autoscaler starts pods
        accounts.append(account)
    our_pods = {"podSelector": {"matchLabels": dict(LABEL)}}

    def namespace_pods(name: str) -> Document:
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}

    def ports(*numbers: int, protocol: str = "TCP") -> list[Document]:
        return [{"protocol": protocol, "port": number} for number in numbers]

    def addresses(*names: str) -> list[Document]:
        return [{"ipBlock": {"cidr": f"{name}/32"}} for name in names]

    incoming = {
        "podSelector": {"matchLabels": dict(LABEL)},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [our_pods]},
            {"from": [namespace_pods(site["operator_namespace"])], "ports": ports(8265, 52365)},
            {
                "from": [namespace_pods(site["monitoring_namespace"])],
                "ports": ports(METRICS_PORT, AUTOSCALER_PORT, DASHBOARD_PORT),
            },
        ],
    }
    # Workers fetch untrusted URLs, so they cannot reach private networks or the metadata server.
    private = ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"]
    outgoing = {
        "podSelector": {"matchLabels": {**LABEL, "app.kubernetes.io/component": "worker"}},
        "policyTypes": ["Egress"],
        "egress": [
            {"to": [our_pods]},
            {
                # DNS: cluster, NodeLocal DNSCache, Google's.
                "to": [
                    namespace_pods("kube-system"),
                    *addresses("169.254.20.10", "169.254.169.254"),
                ],
                "ports": ports(53) + ports(53, protocol="UDP"),
            },
            *(
                {
                    "to": addresses(service.rpartition(":")[0]),
                    "ports": ports(int(service.rpartition(":")[2])),
                }
                for service in site["kubernetes_private_services"]
            ),
            {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": private}}]},
        ],
    }
    budget = {
        # More than there are, so none may be evicted. `maxUnavailable: 0` is an error for pods of a
        # RayCluster, which has no scale subresource (kuberay#2662).
        "minAvailable": 1000,
        "selector": {"matchLabels": {**LABEL, "app.kubernetes.io/component": "head"}},
    }
    return [
        namespace,
        *accounts,
        named("networking.k8s.io/v1", "NetworkPolicy", "vlv-incoming", sizes, incoming),
        named("networking.k8s.io/v1", "NetworkPolicy", "vlv-outgoing", sizes, outgoing),
        named("policy/v1", "PodDisruptionBudget", "vlv-head", sizes, budget),
    ]
