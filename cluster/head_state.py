"""Redis, in which the head of the standing cluster keeps what it knows: workers outlive their head.

A head that comes back without it knows none of its workers, and they end: machines that were warm, their
image and models, are lost (Ray's documentation, "GCS fault tolerance in KubeRay"). A job's driver dies with
the head either way, and the same command goes on. The clusters of single jobs need none of this.
"""

from __future__ import annotations

from typing import Any

from cluster.fence import LABEL, Document, named

_NAME, _PORT = "vlv-redis", 6379
# Not the label of our other pods, which may all talk to each other.
_ONLY = {"app.kubernetes.io/name": _NAME}

_SERVE = (
    "mkdir -p /shared/redis && "
    'exec redis-server --dir /shared/redis --appendonly yes --requirepass "$PASSWORD"'
)


def fault_tolerance() -> Document:
    """What the standing cluster's file says about it (KubeRay's GcsFaultToleranceOptions)."""
    return {
        "redisAddress": f"{_NAME}:{_PORT}",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": _NAME, "key": "password"}}},
    }


def redis_files(sizes: dict[str, Any]) -> list[Document]:
    """Redis with its file on the shared disk, which the head alone may talk to."""
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
            "runAsUser": 1000,  # whose the shared disk is
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
