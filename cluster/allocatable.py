"""Allocatable CPU, memory and disk of EKS and GKE nodes, by the formulas that AWS and Google publish.

A pod that requests more stays Pending, and only its events say why. The nodes reserve:

EKS  (eks-ami: bootstrap and nodeadm) memory 255 MiB + 11 MiB per possible pod, and 100 MiB as
     eviction threshold; disk 1 GiB, and 10 % as eviction threshold
GKE  (docs, "Plan node sizes") memory 25 % of the first 4 GiB, 20 % of the next 4, 10 % of the next
     8, 6 % of the next 112, 2 % of the rest, and 100 MiB as eviction threshold; disk the minimum of
     50 %, 6 GiB + 35 % and 100 GiB, and 10 % as eviction threshold
both CPU 6 % of the first core, 1 % of the second, 0.5 % of the next two, 0.25 % of the others
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Fraction of a machine's listed memory that firmware and hypervisor take. Karpenter assumes 7.5 % on
# EC2; Compute Engine machines show about 2 % less than listed.
_VM_OVERHEAD = {"aws": 0.075, "gcp": 0.025}
# DaemonSets: network, proxy, storage and device drivers, logs and metrics.
DAEMONS = {"cpus": 0.6, "memory": 1.2}
# The autoscaler's container in the head pod, and a submitter pod on the head's node.
HEAD_SIDECARS = {"cpus": 1.0, "memory": 2.0}
# The container in each pod that copies logs to the shared disk.
SIDECAR = {"cpus": 0.1, "memory": 0.125}


@dataclass(frozen=True)
class Resources:
    """CPUs, and memory and disk in GiB."""

    cpus: float
    memory: float
    disk: float


def allocatable(cloud: str, machine: dict[str, Any], disk: float) -> Resources:
    """What pods can request of a machine with a disk of `disk` GiB."""
    memory = machine["memory"] * (1 - _VM_OVERHEAD[cloud])
    if cloud == "aws":
        reserved = (255 + 11 * machine["pods"]) / 1024
        disk_reserved = 1.0
    else:
        reserved = _tiered(memory, [(4, 0.25), (4, 0.20), (8, 0.10), (112, 0.06)], 0.02)
        disk_reserved = min(disk / 2, 6 + 0.35 * disk, 100)
    cpus = machine["cpus"] - _tiered(machine["cpus"], [(1, 0.06), (1, 0.01), (2, 0.005)], 0.0025)
    return Resources(cpus, memory - reserved - 100 / 1024, disk - disk_reserved - disk / 10)


def _tiered(amount: float, tiers: list[tuple[float, float]], rest: float) -> float:
    """Sum of a fraction of each tier (width, fraction) of an amount, and `rest` of the remainder."""
    total = 0.0
    for width, fraction in tiers:
        part = min(amount, width)
        total += part * fraction
        amount -= part
    return total + amount * rest


def oversized_pods(sizes: dict[str, Any]) -> list[str]:
    """One line for each pod that does not fit its machine, which says what to lower."""
    lines = []
    for name, size in {"head": sizes["head"], **sizes["groups"]}.items():
        others = [DAEMONS, SIDECAR, *([HEAD_SIDECARS] if name == "head" else [])]
        for cloud in ("aws", "gcp"):
            node = allocatable(cloud, sizes["machines"][size[cloud]], size["disk"])
            for what, unit in (("cpus", "CPUs"), ("memory", "GiB"), ("disk", "GiB of disk")):
                left = getattr(node, what) - sum(part.get(what, 0) for part in others)
                if size["pod"][what] > left:
                    lines.append(
                        f"{name}: pod.{what}={size['pod'][what]}, but {size[cloud]} leaves "
                        f"{math.floor(left * 10) / 10} {unit}: lower it, or choose a larger machine"
                    )
    return lines
