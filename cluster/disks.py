"""Renders the shared disk of all pods: a PersistentVolume and its claim.

kuberay/storage-eks.yaml  on EFS
kuberay/storage-gke.yaml  on Filestore, with a job that makes user 1000 the owner of a new share
"""

from __future__ import annotations

from typing import Any

_MAKE_OWNER = '[ "$(stat -c %u /shared)" != 0 ] || chown 1000:1000 /shared'


def disk_files(sizes: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Kubernetes objects by path below cluster/."""
    return {
        "kuberay/storage-eks.yaml": _storage(sizes, "efs.csi.aws.com", _efs_handle(sizes), {}),
        "kuberay/storage-gke.yaml": [
            *_storage(sizes, "filestore.csi.storage.gke.io", *_filestore_handle(sizes)),
            _chown_job(sizes),
        ],
    }


def _storage(
    sizes: dict[str, Any], driver: str, handle: str, attributes: dict[str, str]
) -> list[dict[str, Any]]:
    """A volume for an existing disk, and its claim."""
    site = sizes["site"]
    name = site["kubernetes_shared_disk"]
    size = {"resources": {"requests": {"storage": "1Ti"}}}  # required, but both drivers ignore it
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
    """The file system, and an access point that makes user 1000 the owner of all new files."""
    return (
        f"{sizes['site']['aws_shared_disk'].partition('.')[0]}::{sizes['site']['efs_access_point']}"
    )


def _filestore_handle(sizes: dict[str, Any]) -> tuple[str, dict[str, str]]:
    site = sizes["site"]
    address, _, share = site["gcp_shared_disk"].partition(":/")
    handle = f"modeInstance/{site['gcp_zone']}/{site['filestore_instance']}/{share}"
    return handle, {"ip": address, "volume": share}


def _chown_job(sizes: dict[str, Any]) -> dict[str, Any]:
    """A one-time job: a new share belongs to root, and `fsGroup` has no effect on NFS.

    It runs in the default namespace, since ours allows no root containers.
    """
    address, _, path = sizes["site"]["gcp_shared_disk"].partition(":")
    container = {
        "name": "own",
        "image": "busybox:1.37",
        "command": ["sh", "-c", _MAKE_OWNER],
        "resources": {
            "requests": {"cpu": "10m", "memory": "16Mi"},
            "limits": {"cpu": "100m", "memory": "16Mi"},
        },
        # Root, with only the capability to change owners.
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
