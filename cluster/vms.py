"""Renders the cluster launcher's files: AWS and GCP machines for `ray up` and Ray's autoscaler."""

from __future__ import annotations

import json
import shlex
from typing import Any

from cluster.kubernetes import HUB_CACHE, image_of

# Inside the container: Ray's default path of the token.
_TOKEN = "/home/ray/.ray/auth_token"
_SHARED = "/shared"
_NFS = {
    "aws": "nfsvers=4.1",
    "gcp": "nfsvers=3",
}  # EFS supports 4.1; all tiers of Filestore support 3


def launcher_files(sizes: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """aws.yaml and gcp.yaml for `ray up`."""
    return {
        "launcher/aws.yaml": [_launcher(sizes, "aws")],
        "launcher/gcp.yaml": [_launcher(sizes, "gcp")],
    }


def _launcher(sizes: dict[str, Any], cloud: str) -> dict[str, Any]:
    site, groups = sizes["site"], sizes["groups"]
    node_config = {"aws": _aws_node, "gcp": _gcp_node}[cloud]
    provider, auth = {"aws": _aws, "gcp": _gcp}[cloud](site)
    nodes: dict[str, Any] = {
        "head": {
            "resources": {"CPU": 0},
            "min_workers": 0,
            "max_workers": 0,
            "node_config": node_config(sizes["head"], site),
        }
    }
    for name, group in groups.items():
        # No on-demand fallback for spot: Ray 2.60 retries an unavailable type forever (docs/decisions.md).
        # It does try the next subnet, that is, another zone.
        nodes[name] = _worker(name, group, node_config(group, site), site)
    # Secrets go only into the environment of Ray's processes, never into a file.
    secret = site[f"{cloud}_secret"]
    region = f"AWS_DEFAULT_REGION={site['aws_region']} " if cloud == "aws" else ""
    secrets = f'S="$({region}vlv-secrets {cloud} {secret})" && eval "$S" && ' if secret else ""
    return {
        "cluster_name": "vlv",
        "max_workers": sum(node["max_workers"] for node in nodes.values()),
        "upscaling_speed": 4.0,
        "idle_timeout_minutes": max(group["idle_minutes"] for group in groups.values()),
        "provider": provider,
        "auth": auth,
        "docker": {
            "image": site["image"],
            **({"head_image": site["cpu_image"]} if site["cpu_image"] else {}),
            "container_name": "vlv",
            "pull_before_run": True,
            "run_options": [
                "--ulimit nofile=65536:65536",
                "--env RAY_AUTH_MODE=token",
                f"--env HF_HOME={HUB_CACHE}",  # shared: each model is downloaded once
                f"--volume {_SHARED}:{_SHARED}",
            ],
        },
        "head_node_type": "head",
        "available_node_types": nodes,
        "file_mounts": {_TOKEN: "~/.ray/auth_token"},
        # These run on the machine, outside the container.
        "initialization_commands": [
            *_LOGINS[cloud](site),
            f"command -v mount.nfs4 || {_install('nfs-common')}",
            f"sudo mkdir -p {_SHARED}",
            f"mountpoint -q {_SHARED} || sudo mount -t nfs "
            f"-o {_NFS[cloud]},hard,timeo=600,retrans=2 {site[cloud + '_shared_disk']} {_SHARED}",
            # A new disk belongs to root; the container's user is 1000.
            f'[ "$(stat -c %u {_SHARED})" != 0 ] || sudo chown 1000:1000 {_SHARED}',
        ],
        # The image has everything installed; empty lists override the launcher's defaults.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "cluster_synced_files": [],
        "head_start_ray_commands": [
            "ray stop",
            f"{secrets}ray start --head --port=6379 --object-manager-port=8076 --dashboard-host=127.0.0.1 "
            "--metrics-export-port=8080 --disable-usage-stats "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{secrets}ray start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076 "
            "--metrics-export-port=8080 --disable-usage-stats",
        ],
    }


def _worker(
    name: str, group: dict[str, Any], machine: dict[str, Any], site: dict[str, Any]
) -> dict[str, Any]:
    gpus = {"GPU": group["gpus"]} if group["gpus"] else {}
    image = image_of(group, site)
    return {
        "resources": {"CPU": group["cpus"], **gpus, name: 1},
        "min_workers": group["min"],
        "max_workers": group["max"],
        "idle_timeout_s": 60 * group["idle_minutes"],
        **({"docker": {"worker_image": image}} if image != site["image"] else {}),
        "node_config": machine,
    }


def _install(package: str) -> str:
    """Install a package on a machine whose cloud-init may still be running apt."""
    apt = "sudo apt-get -qq -o DPkg::Lock::Timeout=300"
    return f"{{ cloud-init status --wait; {apt} update && {apt} install -y {package}; }}"


def _ecr_login(site: dict[str, Any]) -> list[str]:
    """docker gets a temporary password from the machine's profile; none is stored."""
    registry = site["image"].partition("/")[0]
    if not registry.endswith(".amazonaws.com"):
        return []
    config = json.dumps({"credHelpers": {registry: "ecr-login"}})
    return [
        f"command -v docker-credential-ecr-login || {_install('amazon-ecr-credential-helper')}",
        f"mkdir -p ~/.docker && echo {shlex.quote(config)} > ~/.docker/config.json",
    ]


def _artifact_login(site: dict[str, Any]) -> list[str]:
    registry = site["image"].partition("/")[0]
    return (
        [f"gcloud auth configure-docker {registry} --quiet"]
        if registry.endswith("-docker.pkg.dev")
        else []
    )


_LOGINS = {"aws": _ecr_login, "gcp": _artifact_login}


def _aws(site: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    provider = {
        "type": "aws",
        "region": site["aws_region"],
        "use_internal_ips": True,
        "cache_stopped_nodes": False,
    }
    auth = {
        "ssh_user": "ubuntu",
        "ssh_proxy_use_node_id": True,
        "ssh_proxy_command": "aws ssm start-session --target %h "
        f"--document-name AWS-StartSSHSession --parameters portNumber=%p --region {site['aws_region']}",
    }
    return provider, auth


def _aws_node(size: dict[str, Any], site: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = {
        "InstanceType": size["aws"],
        "ImageId": site["aws_image_id"],
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/sda1",
                "Ebs": {
                    "VolumeSize": size["disk"],
                    "VolumeType": "gp3",
                    "Encrypted": True,
                    "DeleteOnTermination": True,
                },
            }
        ],
        # Ray's default group allows SSH from anywhere.
        "SecurityGroupIds": [site["aws_security_group"]],
        "SubnetIds": site["aws_private_subnets"],
        "IamInstanceProfile": {
            "Name": site["aws_worker_profile" if "spot" in size else "aws_head_profile"]
        },
        "TagSpecifications": [
            {
                "ResourceType": kind,
                "Tags": [{"Key": key, "Value": value} for key, value in site["tags"].items()],
            }
            for kind in ("instance", "volume")
        ],
        # IMDSv2 only: a downloaded URL that redirects here cannot read the machine's credentials.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
    }
    if size.get("spot"):
        node["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"InstanceInterruptionBehavior": "terminate"},
        }
    return node


def _gcp(site: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    provider = {
        "type": "gcp",
        "region": site["gcp_region"],
        "availability_zone": site["gcp_zone"],
        "project_id": site["gcp_project"],
        "use_internal_ips": True,
        "cache_stopped_nodes": False,
    }
    auth = {
        "ssh_user": "ubuntu",
        "ssh_proxy_use_node_id": True,
        "ssh_proxy_command": "gcloud compute start-iap-tunnel %h %p --listen-on-stdin "
        f"--project={site['gcp_project']} --zone={site['gcp_zone']}",
    }
    return provider, auth


def _gcp_node(size: dict[str, Any], site: dict[str, Any]) -> dict[str, Any]:
    region = site["gcp_region"]
    node: dict[str, Any] = {
        "machineType": size["gcp"],
        "labels": dict(site["tags"]),
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {
                    "diskSizeGb": size["disk"],
                    # The default is an HDD.
                    "diskType": f"zones/{site['gcp_zone']}/diskTypes/pd-balanced",
                    "labels": dict(site["tags"]),
                    "sourceImage": site["gcp_image"],
                },
            }
        ],
        # No accessConfigs: no public address.
        "networkInterfaces": [
            {
                "subnetwork": f"projects/{site['gcp_project']}/regions/{region}/subnetworks/{site['gcp_subnet']}"
            }
        ],
        "serviceAccounts": [
            {
                "email": site["gcp_worker_account" if "spot" in size else "gcp_head_account"],
                "scopes": ["https://www.googleapis.com/auth/cloud-platform"],
            }
        ],
        "shieldedInstanceConfig": {"enableVtpm": True, "enableIntegrityMonitoring": True},
    }
    scheduling: dict[str, Any] = {}
    if size.get("gpus"):
        scheduling["onHostMaintenance"] = "TERMINATE"  # GPU machines cannot migrate
    if size.get("spot"):
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    if scheduling:
        node["scheduling"] = scheduling
    return node
