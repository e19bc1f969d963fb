"""Renders the EKS and GKE clusters, with a node pool for each group, and the EKS autoscaler.

pools/eksctl.yaml             eksctl create cluster -f cluster/pools/eksctl.yaml
pools/autoscaler-values.yaml  values for the cluster-autoscaler's Helm chart (EKS)
pools/gke.sh                  bash cluster/pools/gke.sh
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from cluster.permissions import SHELL, buckets, nat, policy
from pipelines.estimate.machines import find_machine

_ACCELERATORS = {"A100": "nvidia-a100-80gb", "L4": "nvidia-l4"}  # GKE's names


def pool_files(sizes: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """YAML files by path below cluster/."""
    return {
        "pools/eksctl.yaml": [_eksctl(sizes)],
        "pools/autoscaler-values.yaml": [_autoscaler_values(sizes)],
    }


def pool_texts(sizes: dict[str, Any]) -> dict[str, str]:
    """Other files by path below cluster/."""
    return {"pools/gke.sh": _gke(sizes)}


def _on_demand(group: dict[str, Any]) -> dict[str, Any]:
    """A spot group's fallback when no spot machine is available: the same machines on demand."""
    return {**group, "spot": False, "min": 0, "max": group["on_demand"], "on_demand": 0}


def _pools(sizes: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, group and sizes of each pool: one per group, two for a spot group with a fallback.

    The head's pool scales from zero to one machine per group.
    """
    head = {**sizes["head"], "min": 0, "max": len(sizes["groups"]), "gpus": 0, "spot": False}
    pools = [(pool_name("head"), "head", head)]
    for name, group in sizes["groups"].items():
        pools.append((pool_name(name), name, group))
        if group["on_demand"]:
            pools.append((f"{pool_name(name)}-on-demand", name, _on_demand(group)))
    return pools


def pool_name(group: str) -> str:
    """Name of a group's pool, and of its Kueue flavor."""
    return f"vlv-{group}".replace("_", "-")


def _eksctl(sizes: dict[str, Any]) -> dict[str, Any]:
    site = sizes["site"]
    pools = []
    for pool, name, group in _pools(sizes):
        taints = []
        if group["gpus"]:
            taints.append({"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"})
        if group["spot"]:
            taints.append({"key": "vlv-spot", "value": "true", "effect": "NoSchedule"})
        template = "k8s.io/cluster-autoscaler/node-template"
        tags = {
            # Tells the autoscaler about the nodes of a group that has none yet.
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
                "name": pool,
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
                # The cluster autoscaler, which starts machines (docs/cluster.md installs it).
                {
                    "namespace": "kube-system",
                    "serviceAccountName": "cluster-autoscaler",
                    "wellKnownPolicies": {"autoScaler": True},
                },
                *(
                    {
                        "namespace": site["kubernetes_namespace"],
                        "serviceAccountName": account,
                        "permissionPolicy": policy(*buckets(site)),
                    }
                    for account in ("vlv-head", "vlv-worker")
                ),
            ],
        },
        "addons": [
            # Without this setting EKS accepts NetworkPolicies but does not enforce them.
            {"name": "vpc-cni", "configurationValues": json.dumps({"enableNetworkPolicy": "true"})},
            {"name": "coredns"},
            {"name": "kube-proxy"},
            {"name": "eks-pod-identity-agent"},
            {"name": "aws-efs-csi-driver"},
        ],
        "managedNodeGroups": [
            # For the operator, the autoscaler and other system pods.
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


def _autoscaler_values(sizes: dict[str, Any]) -> dict[str, Any]:
    """The cluster-autoscaler's values: spot pools with a fallback come before all other pools.

    EKS names a pool's Auto Scaling group after it, with a suffix of 36 characters. A pool gets the
    highest priority of the patterns that it matches.
    """
    site = sizes["site"]
    spot = [pool_name(name) for name, group in sizes["groups"].items() if group["on_demand"]]
    first = [f"^eks-{name}-[0-9a-f-]{{36}}$" for name in spot]
    return {
        "autoDiscovery": {"clusterName": site["eks_cluster"]},
        "awsRegion": site["aws_region"],
        "rbac": {"serviceAccount": {"name": "cluster-autoscaler"}},
        "extraArgs": {"expander": "priority,least-waste"},
        # A string: the chart would quote the keys of a mapping.
        "expanderPriorities": yaml.safe_dump({20: first, 10: [".*"]} if first else {10: [".*"]}),
    }


def _gke(sizes: dict[str, Any]) -> str:
    site = sizes["site"]
    cluster = site["gke_cluster"]
    where = f"--project={site['gcp_project']} --region={site['gcp_region']}"
    lines = [
        "# A cluster that enforces NetworkPolicies (Dataplane V2), with a node pool for each group.",
        "set -euo pipefail",
        *nat(cluster, site),
        f"gcloud container clusters create {cluster} {where} \\",
        "  --enable-dataplane-v2 --enable-ip-alias --enable-private-nodes --release-channel=regular \\",
        f"  --workload-pool={site['gcp_project']}.svc.id.goog --addons=GcpFilestoreCsiDriver \\",
        f"  --network={site['gcp_network']} --machine-type=e2-standard-2 --num-nodes=1 --shielded-secure-boot",
    ]
    for pool, name, group in _pools(sizes):
        flags = [
            f"--cluster={cluster}",
            where,
            # ANY: in whichever zone has machines, not evenly in all zones.
            f"--node-locations={','.join(site['gke_zones'])} --location-policy=ANY",
            f"--machine-type={group['gcp']}",
            f"--disk-type=pd-balanced --disk-size={group['disk']}",
            "--num-nodes=0 --enable-autoscaling "
            f"--total-min-nodes={group['min']} --total-max-nodes={group['max']}",
            f"--node-labels=vlv-group={name}",
            f"--labels={','.join(f'{k}={v}' for k, v in site['tags'].items())}",
        ]
        if group["gpus"]:
            kind = _ACCELERATORS[find_machine(group["gcp"]).gpu.name]
            # CUDA 13 in the image needs driver r580 or newer.
            flags.append(
                f"--accelerator=type={kind},count={group['gpus']},gpu-driver-version=latest"
            )
        if group["spot"]:
            flags.append("--spot --node-taints=vlv-spot=true:NoSchedule")
        lines.append(f"gcloud container node-pools create {pool} \\")
        lines.append(" \\\n".join(f"  {flag}" for flag in flags))
    pools = f"{site['gcp_project']}.svc.id.goog/subject/ns/{site['kubernetes_namespace']}"
    lines += [
        "# Pods access the buckets as their Kubernetes service accounts.",
        f"NUMBER=$(gcloud projects describe {site['gcp_project']} --format='value(projectNumber)')",
        f"for BUCKET in {' '.join(site['gcp_buckets'])}; do for ACCOUNT in vlv-head vlv-worker; do",
        '  gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" --role=roles/storage.objectUser \\',
        '    --member="principal://iam.googleapis.com/projects/$NUMBER/locations/global/'
        f'workloadIdentityPools/{pools}/sa/$ACCOUNT"',
        "done; done",
    ]
    return SHELL + "\n".join(lines) + "\n"
