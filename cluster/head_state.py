"""Renders Redis for the long-running cluster's GCS fault tolerance: workers survive a head restart.

Without it a restarted head does not know its workers, and they exit: warm machines with their images
and models are lost (Ray docs, "GCS fault tolerance in KubeRay"). A job's driver dies with the head
either way; the same command continues it. Clusters of single jobs do without Redis.
"""

from __future__ import annotations

from typing import Any

from cluster.namespace import LABEL, Document, named

_NAME, _PORT = "vlv-redis", 6379
# Not our common label, which would let all our pods connect.
_ONLY = {"app.kubernetes.io/name": _NAME}

_SERVE = (
    "mkdir -p /shared/redis && "
    'exec redis-server --dir /shared/redis --appendonly yes --requirepass "$PASSWORD"'
)


def fault_tolerance() -> Document:
    """KubeRay's GcsFaultToleranceOptions of the long-running cluster."""
    return {
        "redisAddress": f"{_NAME}:{_PORT}",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": _NAME, "key": "password"}}},
    }


def redis_files(sizes: dict[str, Any]) -> list[Document]:
    """Redis, with its data on the shared disk; only the head may connect."""
    container = {
        "name": "redis",
        "image": "redis:7.4-alpine",
        "command": ["sh", "-c", _SERVE],
        "env": [
            {
                "name": "PASSWORD",
                "valueFrom": {"secretKeyRef": {"name": _NAME, "key": "password"}},
            }
        ],
        "ports": [{"name": "redis", "containerPort": _PORT}],
        "resources": {
            "requests": {"cpu": "100m", "memory": "256Mi"},
            "limits": {"cpu": "500m", "memory": "256Mi"},
        },
        "readinessProbe": {"tcpSocket": {"port": _PORT}, "periodSeconds": 10},
        "livenessProbe": {"tcpSocket": {"port": _PORT}, "periodSeconds": 20},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
    }
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsUser": 1000,  # owner of the shared disk
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {
                "name": "shared",
                "persistentVolumeClaim": {"claimName": sizes["site"]["kubernetes_shared_disk"]},
            }
        ],
    }
    stateful_set = {
        "serviceName": _NAME,
        "replicas": 1,
        "selector": {"matchLabels": dict(_ONLY)},
        "template": {"metadata": {"labels": dict(_ONLY)}, "spec": pod},
    }
    service = {"selector": dict(_ONLY), "ports": [{"name": "redis", "port": _PORT}]}
    head = {"matchLabels": {**LABEL, "app.kubernetes.io/component": "head"}}
    policy = {
        "podSelector": {"matchLabels": dict(_ONLY)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": [{"podSelector": head}], "ports": [{"port": _PORT, "protocol": "TCP"}]}
        ],
        "egress": [],
    }
    return [
        named("apps/v1", "StatefulSet", _NAME, sizes, stateful_set),
        named("v1", "Service", _NAME, sizes, service),
        named("networking.k8s.io/v1", "NetworkPolicy", _NAME, sizes, policy),
    ]
