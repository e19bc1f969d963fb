"""What has to be there before a cluster is: node pools, roles with the least rights, the shared disk.

pools/eksctl.yaml      eksctl create cluster -f cluster/pools/eksctl.yaml
pools/gke.sh           bash cluster/pools/gke.sh
pools/aws-*.json       policies of the two instance profiles of the launcher's machines
kuberay/storage-*.yaml the claim `vlv-shared` on EFS or Filestore
"""

from __future__ import annotations

import json
from typing import Any

_MAKE_OWNER = '[ "$(stat -c %u /shared)" != 0 ] || chown 1000:1000 /shared'


_ACCELERATORS = {"A100": "nvidia-a100-80gb", "L4": "nvidia-l4"}  # GKE's names


def pool_files(sizes: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """YAML files by path below cluster/."""
    return {
        "pools/eksctl.yaml": [_eksctl(sizes)],
        "kuberay/storage-eks.yaml": _storage(sizes, "efs.csi.aws.com", _efs_handle(sizes), {}),
        "kuberay/storage-gke.yaml": [
            *_storage(sizes, "filestore.csi.storage.gke.io", *_filestore_handle(sizes)),
            _own(sizes),
        ],
    }


def pool_texts(sizes: dict[str, Any]) -> dict[str, str]:
    """Files of other kinds by path below cluster/."""
    policies = {"head": _head_policy(sizes), "worker": _worker_policy(sizes)}
    return {
        "pools/gke.sh": _gke(sizes),
        **{
            f"pools/aws-{name}.json": json.dumps(policy, indent=1) + "\n"
            for name, policy in policies.items()
        },
    }


def _groups(sizes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All pools: the head's has one machine at a time for each job, which comes when it is asked for."""
    head = {**sizes["head"], "min": 0, "max": len(sizes["groups"]), "gpus": 0, "spot": False}
    return {"head": head, **sizes["groups"]}


def pool_name(group: str) -> str:
    """What a group's pool, and its flavor at Kueue, is called."""
    return f"vlv-{group}".replace("_", "-")


def _eksctl(sizes: dict[str, Any]) -> dict[str, Any]:
    site = sizes["site"]
    pools = []
    for name, group in _groups(sizes).items():
        taints = []
        if group["gpus"]:
            taints.append({"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"})
        if group["spot"]:
            taints.append({"key": "vlv-spot", "value": "true", "effect": "NoSchedule"})
        template = "k8s.io/cluster-autoscaler/node-template"
        tags = {
            # Of a group without a machine the autoscaler knows what these say.
            f"{template}/label/vlv-group": name,
            f"{template}/resources/ephemeral-storage": f"{group['disk'] * 9 // 10 - 1}Gi",
            **{f"{template}/taint/{t['key']}": f"{t['value']}:{t['effect']}" for t in taints},
            **(
                {f"{template}/resources/nvidia.com/gpu": str(group["gpus"])}
                if group["gpus"]
                else {}
            ),
            **site["tags"],
        }
        pools.append(
            {
                "name": pool_name(name),
                "instanceTypes": [group["aws"]],
                "spot": group["spot"],
                "minSize": group["min"],
                "desiredCapacity": group["min"],
                "maxSize": group["max"],
                "volumeSize": group["disk"],
                "volumeType": "gp3",
                "volumeEncrypted": True,
                "privateNetworking": True,
                "disableIMDSv1": True,
                "disablePodIMDS": True,
                "labels": {"vlv-group": name},
                **({"taints": taints} if taints else {}),
                "propagateASGTags": True,
                "tags": tags,
            }
        )
    return {
        "apiVersion": "eksctl.io/v1alpha5",
        "kind": "ClusterConfig",
        "metadata": {"name": site["eks_cluster"], "region": site["aws_region"]},
        "iam": {
            "withOIDC": True,
            "podIdentityAssociations": [
                # Nothing starts a machine of an empty pool but this; docs/cluster.md installs it.
                {
                    "namespace": "kube-system",
                    "serviceAccountName": "cluster-autoscaler",
                    "wellKnownPolicies": {"autoScaler": True},
                },
                *(
                    {
                        "namespace": site["kubernetes_namespace"],
                        "serviceAccountName": account,
                        "permissionPolicy": _policy(*_buckets(site)),
                    }
                    for account in ("vlv-head", "vlv-worker")
                ),
            ],
        },
        "addons": [
            # Without this setting EKS accepts NetworkPolicies and enforces none.
            {"name": "vpc-cni", "configurationValues": json.dumps({"enableNetworkPolicy": "true"})},
            {"name": "coredns"},
            {"name": "kube-proxy"},
            {"name": "eks-pod-identity-agent"},
            {"name": "aws-efs-csi-driver"},
        ],
        "managedNodeGroups": [
            # For the operator, the autoscaler and what else a cluster runs; ours go elsewhere.
            {
                "name": "system",
                "instanceTypes": ["m7i.large"],
                "minSize": 2,
                "maxSize": 3,
                "desiredCapacity": 2,
                "privateNetworking": True,
                "disableIMDSv1": True,
            },
            *pools,
        ],
    }


def _gke(sizes: dict[str, Any]) -> str:
    site = sizes["site"]
    cluster = site["gke_cluster"]
    where = f"--project={site['gcp_project']} --region={site['gcp_region']}"
    lines = [
        "#!/bin/bash",
        "# Rendered by cluster/render.py from cluster/sizes.yaml: change that, not this.",
        "# A cluster whose NetworkPolicies are enforced (Dataplane V2), and a pool for each group.",
        "set -euo pipefail",
        "# Machines without public addresses reach registries, the hub and strangers' images by NAT.",
        f"gcloud compute routers create {cluster}-nat {where} --network=default",
        f"gcloud compute routers nats create {cluster}-nat {where} --router={cluster}-nat \\",
        "  --auto-allocate-nat-external-ips --nat-all-subnet-ip-ranges",
        f"gcloud container clusters create {cluster} {where} \\",
        "  --enable-dataplane-v2 --enable-ip-alias --enable-private-nodes --release-channel=regular \\",
        f"  --workload-pool={site['gcp_project']}.svc.id.goog --addons=GcpFilestoreCsiDriver \\",
        "  --machine-type=e2-standard-2 --num-nodes=1 --shielded-secure-boot",
    ]
    for name, group in _groups(sizes).items():
        flags = [
            f"--cluster={cluster}",
            where,
            f"--node-locations={site['gcp_zone']}",
            f"--machine-type={group['gcp']}",
            f"--disk-type=pd-balanced --disk-size={group['disk']}",
            "--num-nodes=0 --enable-autoscaling "
            f"--total-min-nodes={group['min']} --total-max-nodes={group['max']}",
            f"--node-labels=vlv-group={name}",
            f"--labels={','.join(f'{k}={v}' for k, v in site['tags'].items())}",
        ]
        if group["gpus"]:
            kind = _ACCELERATORS[sizes["prices"]["gpus"][group["gcp"]]]
            # CUDA 13 in the image needs a driver of r580 or newer: the newest that GKE has.
            flags.append(
                f"--accelerator=type={kind},count={group['gpus']},gpu-driver-version=latest"
            )
        if group["spot"]:
            flags.append("--spot --node-taints=vlv-spot=true:NoSchedule --location-policy=ANY")
        lines.append(f"gcloud container node-pools create {pool_name(name)} \\")
        lines.append(" \\\n".join(f"  {flag}" for flag in flags))
    return "\n".join(lines) + "\n"


def _head_policy(sizes: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler does on AWS: it starts, tags and ends machines of its own cluster."""
    site = sizes["site"]
    ours = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "vlv"}}
    asked = {"StringEquals": {"aws:RequestTag/ray-cluster-name": "vlv"}}
    made = {"StringEquals": {"ec2:CreateAction": "RunInstances"}}
    return _policy(
        _allow("Look", ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeImages",
                        "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:DescribeKeyPairs",
                        "ec2:DescribeAvailabilityZones"]),
        _allow("StartOurs", ["ec2:RunInstances"], "arn:aws:ec2:*:*:instance/*", asked),
        _allow("StartWith", ["ec2:RunInstances"], [
            "arn:aws:ec2:*::image/*", "arn:aws:ec2:*:*:subnet/*", "arn:aws:ec2:*:*:volume/*",
            "arn:aws:ec2:*:*:network-interface/*", "arn:aws:ec2:*:*:key-pair/*",
            f"arn:aws:ec2:*:*:security-group/{site['aws_security_group']}"]),
        _allow("TagNew", ["ec2:CreateTags"], "arn:aws:ec2:*:*:*/*", made),
        _allow("TagAndEndOurs", ["ec2:CreateTags", "ec2:TerminateInstances"],
               "arn:aws:ec2:*:*:instance/*", ours),
        _allow("GiveWorkersTheirRole", ["iam:PassRole"],
               f"arn:aws:iam::*:role/{site['aws_worker_profile']}",
               {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}),
        _allow("ReadProfiles", ["iam:GetInstanceProfile"],
               f"arn:aws:iam::*:instance-profile/{site['aws_worker_profile']}"),
        *_shared_rights(sizes),
    )  # fmt: skip


def _worker_policy(sizes: dict[str, Any]) -> dict[str, Any]:
    return _policy(*_shared_rights(sizes))


def _shared_rights(sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Sessions, the image, the buckets, and the secret that has the keys."""
    site = sizes["site"]
    secret = site["aws_secret"]
    return [
        _allow("Sessions", ["ssm:UpdateInstanceInformation", "ssmmessages:CreateControlChannel",
                            "ssmmessages:CreateDataChannel", "ssmmessages:OpenControlChannel",
                            "ssmmessages:OpenDataChannel"]),
        _allow("Image", ["ecr:GetAuthorizationToken", "ecr:BatchGetImage",
                         "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"]),
        *_buckets(site),
        *([_allow("Keys", ["secretsmanager:GetSecretValue"],
                  f"arn:aws:secretsmanager:*:*:secret:{secret}-*")] if secret else []),
    ]  # fmt: skip


def _buckets(site: dict[str, Any]) -> list[dict[str, Any]]:
    names = site["aws_buckets"]
    objects = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    return [
        _allow("List", ["s3:ListBucket"], [f"arn:aws:s3:::{name}" for name in names]),
        _allow("ReadAndWrite", objects, [f"arn:aws:s3:::{name}/*" for name in names]),
    ]


def _policy(*statements: dict[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}


def _allow(
    sid: str, actions: list[str], resources: str | list[str] = "*", condition: Any = None
) -> dict[str, Any]:
    statement = {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources}
    return {**statement, **({"Condition": condition} if condition else {})}


# ---------------------------------------------------------------------------------- shared disk


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
                    "containers": [container],
                    "volumes": [{"name": "shared", "nfs": {"server": address, "path": path}}],
                }
            },
        },
    }
