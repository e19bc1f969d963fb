"""Renders least-privilege permissions of the launcher's machines, and scripts to create accounts.

pools/aws-*.json          policies of the two instance profiles
pools/aws-launcher.sh     bash cluster/pools/aws-launcher.sh: profiles, security group, shared disk
pools/gcp-head-role.yaml  role of the head
pools/gcp-launcher.sh     bash cluster/pools/gcp-launcher.sh: accounts, firewall, shared disk
"""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

SHELL = """#!/bin/bash
# Rendered by cluster/render.py from cluster/sizes.yaml: edit that file, not this one.
"""


def permission_files(sizes: dict[str, Any]) -> dict[str, str]:
    """Text of each file by path below cluster/."""
    policies = {"head": _head_policy(sizes), "worker": _worker_policy(sizes)}
    role = yaml.safe_dump(_GCP_ROLE, sort_keys=False)
    return {
        **{
            f"pools/aws-{name}.json": json.dumps(policy, indent=1) + "\n"
            for name, policy in policies.items()
        },
        "pools/aws-launcher.sh": _aws_script(sizes["site"]),
        "pools/gcp-head-role.yaml": role,
        "pools/gcp-launcher.sh": _gcp_script(sizes["site"]),
    }


# ------------------------------------------------------------------------------------------ AWS


def _head_policy(sizes: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler needs on AWS: start, tag and terminate machines of its own cluster."""
    site = sizes["site"]
    tagged_ours = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "vlv"}}
    tag_requested = {"StringEquals": {"aws:RequestTag/ray-cluster-name": "vlv"}}
    at_creation = {"StringEquals": {"ec2:CreateAction": "RunInstances"}}
    return policy(
        _allow("Look", ["ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeImages",
                        "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:DescribeKeyPairs",
                        "ec2:DescribeAvailabilityZones"]),
        _allow("StartOurs", ["ec2:RunInstances"], "arn:aws:ec2:*:*:instance/*", tag_requested),
        _allow("StartWith", ["ec2:RunInstances"], [
            "arn:aws:ec2:*::image/*", "arn:aws:ec2:*:*:subnet/*", "arn:aws:ec2:*:*:volume/*",
            "arn:aws:ec2:*:*:network-interface/*", "arn:aws:ec2:*:*:key-pair/*",
            f"arn:aws:ec2:*:*:security-group/{site['aws_security_group']}"]),
        _allow("TagNew", ["ec2:CreateTags"], "arn:aws:ec2:*:*:*/*", at_creation),
        _allow("TagAndEndOurs", ["ec2:CreateTags", "ec2:TerminateInstances"],
               "arn:aws:ec2:*:*:instance/*", tagged_ours),
        _allow("GiveWorkersTheirRole", ["iam:PassRole"],
               f"arn:aws:iam::*:role/{site['aws_worker_profile']}",
               {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}),
        _allow("ReadProfiles", ["iam:GetInstanceProfile"],
               f"arn:aws:iam::*:instance-profile/{site['aws_worker_profile']}"),
        *_shared_rights(sizes),
    )  # fmt: skip


def _worker_policy(sizes: dict[str, Any]) -> dict[str, Any]:
    return policy(*_shared_rights(sizes))


def _shared_rights(sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """SSM sessions, the image, the buckets, and the secret with API keys."""
    site = sizes["site"]
    secret = site["aws_secret"]
    return [
        _allow("Sessions", ["ssm:UpdateInstanceInformation", "ssmmessages:CreateControlChannel",
                            "ssmmessages:CreateDataChannel", "ssmmessages:OpenControlChannel",
                            "ssmmessages:OpenDataChannel"]),
        _allow("Image", ["ecr:GetAuthorizationToken", "ecr:BatchGetImage",
                         "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"]),
        *buckets(site),
        *([_allow("Keys", ["secretsmanager:GetSecretValue"],
                  f"arn:aws:secretsmanager:*:*:secret:{secret}-*")] if secret else []),
    ]  # fmt: skip


def buckets(site: dict[str, Any]) -> list[dict[str, Any]]:
    """Statements that allow reading and writing the site's buckets."""
    names = site["aws_buckets"]
    objects = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    return [
        _allow("List", ["s3:ListBucket"], [f"arn:aws:s3:::{name}" for name in names]),
        _allow("ReadAndWrite", objects, [f"arn:aws:s3:::{name}/*" for name in names]),
    ]


def policy(*statements: dict[str, Any]) -> dict[str, Any]:
    """An IAM policy document."""
    return {"Version": "2012-10-17", "Statement": list(statements)}


def _allow(
    sid: str, actions: list[str], resources: str | list[str] = "*", condition: Any = None
) -> dict[str, Any]:
    statement = {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources}
    return {**statement, **({"Condition": condition} if condition else {})}


def _create_unless(exists: str, create: str) -> list[str]:
    """Lines of an idempotent script: run `create` unless the command `exists` succeeds."""
    return [f"{exists} > /dev/null 2>&1 || \\", f"  {create}"]


def _aws_script(site: dict[str, Any]) -> str:
    ec2_trust = {
        "Effect": "Allow",
        "Principal": {"Service": "ec2.amazonaws.com"},
        "Action": "sts:AssumeRole",
    }
    trust = shlex.quote(json.dumps(policy(ec2_trust)))
    lines = [
        "# Creates what Ray's launcher needs on AWS besides subnets with a NAT gateway: two instance",
        "# profiles, a security group and the shared disk. Idempotent. Prints the values for sizes.yaml.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f"export AWS_DEFAULT_REGION={site['aws_region']}",
        "# Spot machines need this role of the account; it may exist already.",
        "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com > /dev/null 2>&1 || true",
    ]
    for kind in ("head", "worker"):
        name = site[f"aws_{kind}_profile"]
        profile = f"--instance-profile-name {name}"
        lines += [
            *_create_unless(
                f"aws iam get-role --role-name {name}",
                f"aws iam create-role --role-name {name} --assume-role-policy-document {trust} > /dev/null",
            ),
            f"aws iam put-role-policy --role-name {name} --policy-name vlv \\",
            f"  --policy-document file://aws-{kind}.json",
            *_create_unless(
                f"aws iam get-instance-profile {profile}",
                f"{{ aws iam create-instance-profile {profile} > /dev/null && \\\n"
                f"    aws iam add-role-to-instance-profile {profile} --role-name {name}; }}",
            ),
        ]
    tags = " ".join(f"Key={key},Value={value}" for key, value in site["tags"].items())
    subnets = " ".join(site["aws_private_subnets"])
    lines += [
        f"VPC=$(aws ec2 describe-subnets --subnet-ids {site['aws_private_subnets'][0]} \\",
        "  --query 'Subnets[0].VpcId' --output text)",
        "GROUP=$(aws ec2 describe-security-groups --query 'SecurityGroups[0].GroupId' --output text \\",
        '  --filters Name=group-name,Values=vlv "Name=vpc-id,Values=$VPC")',
        'if [ "$GROUP" = None ]; then',
        '  GROUP=$(aws ec2 create-security-group --group-name vlv --description vlv --vpc-id "$VPC" \\',
        "    --query GroupId --output text)",
        "  # Only members of the group can connect. SSM sessions need no open port.",
        '  aws ec2 authorize-security-group-ingress --group-id "$GROUP" --protocol=-1 \\',
        '    --source-group "$GROUP" > /dev/null',
        "fi",
        "disk() {",
        '  aws efs describe-file-systems --creation-token vlv --query "FileSystems[0].$1" --output text',
        "}",
        'if [ "$(disk FileSystemId)" = None ]; then',
        "  aws efs create-file-system --creation-token vlv --encrypted --throughput-mode elastic \\",
        f"    --tags {tags} > /dev/null",
        "fi",
        'until [ "$(disk LifeCycleState)" = available ]; do sleep 2; done',
        "DISK=$(disk FileSystemId)",
        'TARGETS=$(aws efs describe-mount-targets --file-system-id "$DISK" --output text \\',
        "  --query 'MountTargets[].SubnetId')",
        f"for SUBNET in {subnets}; do",
        '  [[ "$TARGETS" == *"$SUBNET"* ]] || aws efs create-mount-target --file-system-id "$DISK" \\',
        '    --subnet-id "$SUBNET" --security-groups "$GROUP" > /dev/null',
        "done",
        'echo "aws_security_group: $GROUP"',
        f'echo "aws_shared_disk: $DISK.efs.{site["aws_region"]}.amazonaws.com:/"',
        'echo "Put both under site in cluster/sizes.yaml, render again, and run this again: the head\'s policy names the group."',
    ]
    return SHELL + "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------ GCP

# Permissions of the API calls of Ray's autoscaler (instances: list, get, insert, setLabels, setMetadata,
# delete; operations: get), and those that "instances.insert" also needs (Compute Engine docs).
_GCP_ROLE = {
    "title": "Head of a Ray cluster",
    "description": "Starts, labels and ends the machines of its cluster",
    "stage": "GA",
    "includedPermissions": [
        "compute.instances.create",
        "compute.instances.delete",
        "compute.instances.get",
        "compute.instances.list",
        "compute.instances.setLabels",
        "compute.instances.setMetadata",
        "compute.instances.setServiceAccount",
        "compute.instances.setTags",
        "compute.disks.create",
        "compute.disks.setLabels",
        "compute.images.useReadOnly",
        "compute.subnetworks.use",
        "compute.zoneOperations.get",
    ],
}


def _gcp_script(site: dict[str, Any]) -> str:
    project, region, network = site["gcp_project"], site["gcp_region"], site["gcp_network"]
    head, worker = site["gcp_head_account"], site["gcp_worker_account"]
    here = f"--project={project}"
    apis = ["artifactregistry", "cloudresourcemanager", "compute", "file", "iam", "secretmanager"]
    lines = [
        "# Creates what Ray's launcher needs on GCP: accounts, NAT, firewall rules, the shared disk.",
        "# Idempotent. A network has one NAT: remove it here if gke.sh created it.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f"gcloud services enable {here} {' '.join(f'{api}.googleapis.com' for api in apis)}",
        *_create_unless(
            f"gcloud iam roles describe vlvHead {here}",
            f"gcloud iam roles create vlvHead {here} --file=gcp-head-role.yaml",
        ),
    ]
    for account in (head, worker):
        member = f"--member=serviceAccount:{account}"
        lines += [
            *_create_unless(
                f"gcloud iam service-accounts describe {account} {here}",
                f"{{ gcloud iam service-accounts create {account.partition('@')[0]} {here} && sleep 15; }}",
            ),
            f"gcloud projects add-iam-policy-binding {project} {member} --condition=None \\",
            "  --role=roles/artifactregistry.reader",
            *(
                f"gcloud storage buckets add-iam-policy-binding gs://{bucket} {member} \\\n"
                "  --role=roles/storage.objectUser"
                for bucket in site["gcp_buckets"]
            ),
        ]
        if site["gcp_secret"]:
            lines += [
                f"gcloud secrets add-iam-policy-binding {site['gcp_secret']} {here} {member} \\",
                "  --role=roles/secretmanager.secretAccessor",
            ]
    ours = f"{head},{worker}"
    share = f"{site['filestore_instance']} {here} --zone={site['gcp_zone']}"
    lines += [
        f"gcloud projects add-iam-policy-binding {project} --member=serviceAccount:{head} \\",
        f"  --condition=None --role=projects/{project}/roles/vlvHead",
        f"gcloud iam service-accounts add-iam-policy-binding {worker} {here} \\",
        f"  --member=serviceAccount:{head} --role=roles/iam.serviceAccountUser",
        *nat("vlv", site),
        f"gcloud compute networks subnets update {site['gcp_subnet']} {here} --region={region} \\",
        "  --enable-private-ip-google-access",
        "# SSH is allowed only from Google's Identity-Aware Proxy.",
        *_create_unless(
            f"gcloud compute firewall-rules describe vlv-ssh {here}",
            f"gcloud compute firewall-rules create vlv-ssh {here} --network={network} --allow=tcp:22 \\\n"
            f"  --source-ranges=35.235.240.0/20 --target-service-accounts={ours}",
        ),
        *_create_unless(
            f"gcloud compute firewall-rules describe vlv-among {here}",
            f"gcloud compute firewall-rules create vlv-among {here} --network={network} \\\n"
            f"  --allow=tcp,udp,icmp --source-service-accounts={ours} --target-service-accounts={ours}",
        ),
        *_create_unless(
            f"gcloud filestore instances describe {share}",
            f"gcloud filestore instances create {share} --tier=BASIC_SSD \\\n"
            f"  --network=name={network} --file-share=name=shared,capacity=2560GiB",
        ),
        'echo "Set site.gcp_shared_disk to this address, followed by :/shared:"',
        f"gcloud filestore instances describe {share} \\",
        "  --format='value(networks[0].ipAddresses[0])'",
    ]
    return SHELL + "\n".join(lines) + "\n"


def nat(name: str, site: dict[str, Any]) -> list[str]:
    """Commands to create a NAT: machines without public addresses need it for all downloads."""
    where = f"--project={site['gcp_project']} --region={site['gcp_region']}"
    return [
        *_create_unless(
            f"gcloud compute routers describe {name}-nat {where}",
            f"gcloud compute routers create {name}-nat {where} --network={site['gcp_network']}",
        ),
        *_create_unless(
            f"gcloud compute routers nats describe {name}-nat {where} --router={name}-nat",
            f"gcloud compute routers nats create {name}-nat {where} --router={name}-nat \\\n"
            "  --auto-allocate-nat-external-ips --nat-all-subnet-ip-ranges",
        ),
    ]
