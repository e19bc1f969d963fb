"""The disk that all pods share, as a volume of Kubernetes and the claim that our pods name.

kuberay/storage-eks.yaml  on EFS
kuberay/storage-gke.yaml  on Filestore, and the job that gives a new share to our user
"""

from __future__ import annotations

from typing import Any

_MAKE_OWNER = '[ "$(stat -c %u /shared)" != 0 ] || chown 1000:1000 /shared'


def disk_files(sizes: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Documents by path below cluster/."""
    return {
        "kuberay/storage-eks.yaml": _storage(sizes, "efs.csi.aws.com", _efs_handle(sizes), {}),
        "kuberay/storage-gke.yaml": [
            *_storage(sizes, "filestore.csi.storage.gke.io", *_filestore_handle(sizes)),
            _own(sizes),
        ],
    }


def _storage(
    sizes: dict[str, Any], driver: str, handle: str, attributes: dict[str, str]
) -> list[dict[str, Any]]:
    """A volume on a disk that is there, and the claim that our pods name."""
    site = sizes["site"]
    name = site["kubernetes_shared_disk"]
    size = {"resources": {"requests": {"storage": "1Ti"}}}  # neither driver looks at it
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Ti"},
            "accessModes": ["ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "csi": {
                "driver": driver,
                "volumeHandle": handle,
                **({"volumeAttributes": attributes} if attributes else {}),
            },
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": site["kubernetes_namespace"]},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "volumeName": name,
            **size,
        },
    }
    return [volume, claim]


def _efs_handle(sizes: dict[str, Any]) -> str:
    """A file system, and an access point that makes user 1000 the owner of every file written through it."""
    return (
        f"{sizes['site']['aws_shared_disk'].partition('.')[0]}::{sizes['site']['efs_access_point']}"
    )


def _filestore_handle(sizes: dict[str, Any]) -> tuple[str, dict[str, str]]:
    site = sizes["site"]
    address, _, share = site["gcp_shared_disk"].partition(":/")
    handle = f"modeInstance/{site['gcp_zone']}/{site['filestore_instance']}/{share}"
    return handle, {"ip": address, "volume": share}


def _own(sizes: dict[str, Any]) -> dict[str, Any]:
    """Once: a new share belongs to root, and `fsGroup` does nothing on NFS. Not in our namespace, in
    which no container may be root."""
    address, _, path = sizes["site"]["gcp_shared_disk"].partition(":")
    container = {
        "name": "own",
        "image": "busybox:1.37",
        "command": ["sh", "-c", _MAKE_OWNER],
        "resources": {
            "requests": {"cpu": "10m", "memory": "16Mi"},
            "limits": {"cpu": "100m", "memory": "16Mi"},
        },
        # Root, who may change an owner and nothing else.
        "securityContext": {
            "runAsUser": 0,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], "add": ["CHOWN", "DAC_READ_SEARCH"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "vlv-own-shared", "namespace": "default"},
        "spec": {
            "ttlSecondsAfterFinished": 600,
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "containers": [container],
                    "volumes": [{"name": "shared", "nfs": {"server": address, "path": path}}],
                }
            },
        },
    }
