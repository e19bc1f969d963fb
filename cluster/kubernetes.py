"""Renders the KubeRay files: a long-running cluster, a cluster per job, and jobs queued by Kueue."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from cluster.allocatable import SIDECAR
from cluster.head_state import fault_tolerance, redis_files
from cluster.monitoring import METRICS_PORT, METRICS_PORTS
from cluster.namespace import LABEL, Document, named, namespace_objects
from cluster.queues import queues

_CODE = "/home/ray/vlv"  # in the image
HUB_CACHE = "/shared/huggingface"
SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
"""Secrets that a job may need: keys of the Kubernetes secret `vlv-secrets`, never in a file."""
# Keeps the cluster autoscaler and Karpenter from evicting our pods to consolidate nodes.
_NO_EVICTION = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
# Labels of spot nodes on GKE, in EKS node groups and with Karpenter.
_SPOT_LABELS = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
}
# Logs are lost with the pod, so they are copied to the shared disk every 30 seconds and at the end.
_COPY_LOGS = """\
copy() {
  mkdir -p "$KEPT" && rsync -a /tmp/ray/session_latest/logs/ "$KEPT/" 2>/dev/null
}
trap 'copy; exit 0' TERM
while true; do copy; sleep 30 & wait; done
"""


def ray_version() -> str:
    """The image's Ray version, from the lock file; the operator needs it."""
    lock = (Path(__file__).parent / "requirements.lock").read_text(encoding="utf-8")
    (version,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    return str(version)


def image_of(size: dict[str, Any], site: dict[str, Any]) -> str:
    """The image of a group's machines: without GPUs the image without CUDA, if there is one."""
    return str(site["image"] if size.get("gpus") else site["cpu_image"] or site["image"])


def kubernetes_files(sizes: dict[str, Any]) -> dict[str, list[Document]]:
    """The objects of every file in kuberay/, by path below cluster/."""
    cluster = _cluster(sizes, sizes["groups"])
    cluster["gcsFaultToleranceOptions"] = fault_tolerance()
    files = {
        "kuberay/namespace.yaml": namespace_objects(sizes),
        "kuberay/redis.yaml": redis_files(sizes),
        "kuberay/raycluster.yaml": [named("ray.io/v1", "RayCluster", "vlv", sizes, cluster)],
    }
    for job in sizes["jobs"]:
        files[f"kuberay/rayjob-{job}.yaml"] = [_job(sizes, job)]
        files[f"kuberay/kueue-{job}.yaml"] = [_queued(sizes, job)]
    files["kuberay/kueue-queues.yaml"] = queues(sizes)
    return files


# ------------------------------------------------------------------------------------------ Ray


def _cluster(sizes: dict[str, Any], groups: dict[str, Any]) -> Document:
    return {
        "rayVersion": ray_version(),
        "authOptions": {"mode": "token"},  # the operator creates the token for all pods
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 60 * max(group["idle_minutes"] for group in groups.values()),
            "resources": _requests({"cpu": "500m", "memory": "1Gi"}),
            "securityContext": _RESTRICTED,
        },
        "headGroupSpec": {
            "rayStartParams": {
                "num-cpus": "0",
                "num-gpus": "0",
                "object-store-memory": str(sizes["head"]["object_store"] * 2**30),
                "dashboard-host": "0.0.0.0",  # protected by the token and the network policies
                "metrics-export-port": str(METRICS_PORT),
            },
            "template": _pod(sizes, sizes["head"], "head"),
        },
        "workerGroupSpecs": [_group(sizes, name, group) for name, group in groups.items()],
    }


def _group(sizes: dict[str, Any], name: str, group: dict[str, Any]) -> Document:
    return {
        "groupName": name.replace("_", "-"),  # part of the pods' names
        "replicas": group["min"],
        "minReplicas": group["min"],
        "maxReplicas": group["max"],
        "idleTimeoutSeconds": 60 * group["idle_minutes"],
        "rayStartParams": {
            "num-cpus": str(group["pod"]["cpus"]),
            "num-gpus": str(group["gpus"]),
            "object-store-memory": str(group["object_store"] * 2**30),
            "metrics-export-port": str(METRICS_PORT),
            "resources": f"'{json.dumps({name: 1})}'",
        },
        "template": _pod(sizes, group, name),
    }


_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _requests(amounts: dict[str, str]) -> Document:
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _probe(*urls: str, failures: int) -> Document:
    checks = " && ".join(f"wget --timeout=3 -qO- {url} | grep -q success" for url in urls)
    return {
        "exec": {"command": ["bash", "-c", checks]},
        "initialDelaySeconds": 10,
        "periodSeconds": 10,
        "timeoutSeconds": 8,
        "failureThreshold": failures,
    }


def _pod(sizes: dict[str, Any], size: dict[str, Any], name: str) -> Document:
    head, site, requested = name == "head", sizes["site"], size["pod"]
    amounts = {"cpu": str(requested["cpus"]), "memory": f"{requested['memory']}Gi"}
    amounts["ephemeral-storage"] = f"{requested['disk']}Gi"
    if size.get("gpus"):
        amounts["nvidia.com/gpu"] = str(size["gpus"])
    healthy = ["http://localhost:52365/api/local_raylet_healthz"]
    if head:
        healthy.append("http://localhost:8265/api/gcs_healthz")
    ports = {"metrics": METRICS_PORT}
    if head:
        ports = {"gcs": 6379, "dashboard": 8265, "client": 10001, **METRICS_PORTS}
    container: Document = {
        "name": "ray",
        "image": image_of(size, site),
        "ports": [{"name": key, "containerPort": port} for key, port in ports.items()],
        "env": [
            {"name": "HF_HOME", "value": HUB_CACHE},  # shared: each model is downloaded once
            *(
                {
                    "name": key,
                    "valueFrom": {
                        "secretKeyRef": {"name": "vlv-secrets", "key": key, "optional": True}
                    },
                }
                for key in SECRETS
            ),
        ],
        "resources": _requests(amounts),
        "securityContext": _RESTRICTED,
        "readinessProbe": _probe(*healthy, failures=6),
        "livenessProbe": _probe(*healthy, failures=12),
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "scratch", "mountPath": "/tmp"},
            {"name": "shared", "mountPath": "/shared"},
        ],
    }
    pod: Document = {
        "terminationGracePeriodSeconds": 25 if size.get("spot") else 60,
        # Also for containers that the operator adds.
        "securityContext": {
            "fsGroup": 1000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_pull_secrets(site),
        "initContainers": [_log_sidecar(image_of(size, site))],
        "containers": [container],
        "volumes": [
            {
                "name": "shm",
                # The object store, and 1 GiB per GPU for NCCL.
                "emptyDir": {
                    "medium": "Memory",
                    "sizeLimit": f"{size['object_store'] + max(1, size.get('gpus', 0))}Gi",
                },
            },
            {"name": "scratch", "emptyDir": {"sizeLimit": f"{requested['disk'] * 7 // 10}Gi"}},
            {
                "name": "shared",
                "persistentVolumeClaim": {"claimName": site["kubernetes_shared_disk"]},
            },
        ],
    }
    if head:
        # Without this volume KubeRay mounts its own of the same name and path, without a size limit
        # and only in the containers of Ray and the autoscaler: the log sidecar would see no logs.
        logs = {"name": "ray-logs", "emptyDir": {"sizeLimit": f"{requested['disk'] // 5}Gi"}}
        pod["volumes"].append(logs)
        for one in (container, *pod["initContainers"]):
            one["volumeMounts"].append({"name": "ray-logs", "mountPath": "/tmp/ray"})
        pod["serviceAccountName"] = "vlv-head"  # the operator allows it to start pods
        pod |= _on_head_machines()
    else:
        container["lifecycle"] = {"preStop": {"exec": {"command": ["bash", "-c", "ray stop"]}}}
        pod |= {
            "serviceAccountName": "vlv-worker",
            "automountServiceAccountToken": False,
            "nodeSelector": {"vlv-group": name},
            "tolerations": _tolerations(size),
        }
    component = "head" if head else "worker"
    labels = {**LABEL, "app.kubernetes.io/component": component}
    return {"metadata": {"labels": labels, "annotations": dict(_NO_EVICTION)}, "spec": pod}


def _pull_secrets(site: dict[str, Any]) -> Document:
    name = site["kubernetes_pull_secret"]
    return {"imagePullSecrets": [{"name": name}]} if name else {}


def _on_head_machines() -> Document:
    """Head and submitter must outlive workers: they run on the head pool and never on spot nodes."""
    rules = [
        {"key": key, "operator": "NotIn", "values": [value]} for key, value in _SPOT_LABELS.items()
    ]
    terms = {"nodeSelectorTerms": [{"matchExpressions": rules}]}
    return {
        "nodeSelector": {"vlv-group": "head"},
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}},
    }


def _log_sidecar(image: str) -> Document:
    """Copies logs; as a native sidecar (Kubernetes 1.29) it ends after the pod's other containers."""
    amounts = {
        "cpu": f"{SIDECAR['cpus'] * 1000:.0f}m",
        "memory": f"{SIDECAR['memory'] * 1024:.0f}Mi",
    }
    return {
        "name": "logs",
        "image": image,
        "restartPolicy": "Always",
        "command": ["bash", "-c", _COPY_LOGS],
        "env": [
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "KEPT", "value": "/shared/ray-logs/$(POD)"},
        ],
        "resources": _requests(amounts),
        "securityContext": _RESTRICTED,
        "volumeMounts": [
            {"name": "scratch", "mountPath": "/tmp"},
            {"name": "shared", "mountPath": "/shared"},
        ],
    }


def _tolerations(size: dict[str, Any]) -> list[Document]:
    keys = ["nvidia.com/gpu"] if size["gpus"] else []
    # The taint of our spot pools (cluster/pools.py).
    keys += ["vlv-spot"] if size["spot"] else []
    return [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in keys]


# ----------------------------------------------------------------------------------------- jobs


def _job(sizes: dict[str, Any], name: str) -> Document:
    job = sizes["jobs"][name]
    groups = {group: sizes["groups"][group] for group in job["groups"]}
    command = [
        "python", f"{_CODE}/jobs/{name}.py",
        "--config", f"{_CODE}/jobs/configs/full/{name}.yaml",
        *job["settings"],
        *([f"ray.group={job['models']}"] if job["models"] else []),
    ]  # fmt: skip
    environment = yaml.safe_load((Path(__file__).parent / "runtime_env.yaml").read_text())
    submitter = {
        "name": "submitter",
        "image": image_of(sizes["head"], sizes["site"]),
        "resources": _requests({"cpu": "500m", "memory": "1Gi"}),
        "securityContext": _RESTRICTED,
    }
    spec = {
        "entrypoint": shlex.join(command),
        "runtimeEnvYAML": yaml.safe_dump(environment),
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": {
            "metadata": {
                "labels": {**LABEL, "app.kubernetes.io/component": "submitter"},
                "annotations": dict(_NO_EVICTION),
            },
            "spec": {
                "restartPolicy": "Never",
                **_pull_secrets(sizes["site"]),
                "containers": [submitter],
                **_on_head_machines(),
            },
        },
        "backoffLimit": 2,  # a retry continues where the lost cluster stopped
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": _cluster(sizes, groups),
    }
    return named("ray.io/v1", "RayJob", f"vlv-{name}", sizes, spec)


def _queued(sizes: dict[str, Any], name: str) -> Document:
    """The job for Kueue, which admits all its pods or none: the cluster has a fixed size."""
    job = _job(sizes, name)
    job["metadata"]["name"] += "-queued"
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "vlv"
    spec = job["spec"]
    spec["suspend"] = True
    spec["backoffLimit"] = 0  # a retry would bypass the queue
    cluster = spec["rayClusterSpec"]
    cluster["enableInTreeAutoscaling"] = False
    del cluster["autoscalerOptions"]
    for group in cluster["workerGroupSpecs"]:
        del group["idleTimeoutSeconds"]
        group["replicas"] = group["minReplicas"] = group["maxReplicas"]
    return job
