"""How much of a machine pods may ask for on EKS and on GKE, by the formulas that AWS and Google publish.

A pod that asks for more stays Pending for ever, and nothing says why but its events.

EKS  kubelet of Amazon's images (eks-ami: bootstrap and nodeadm): memory 255 MiB + 11 MiB for each pod
     that the machine may have, 100 MiB before pods are evicted; disk 1 GiB, and 10 % before eviction
GKE  docs, "Plan node sizes": memory 25 % of the first 4 GiB, 20 % of the next 4, 10 % of the next 8, 6 % of
     the next 112, 2 % of the rest, 100 MiB before eviction; disk the least of half, 6 GiB + 35 % and 100 GiB, and
     10 % before eviction
both CPUs 6 % of the first, 1 % of the second, 0.5 % of the next two, 0.25 % of the others
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Of the memory in a provider's table a machine sees less: firmware and hypervisor. 7.5 % is what
# Karpenter reckons with on EC2; on Compute Engine machines show some 2 % less.
_UNSEEN = {"aws": 0.075, "gcp": 0.025}
# Pods that run on every node: network, proxy, storage and device drivers, logs and figures.
DAEMONS = {"cpus": 0.6, "memory": 1.2}
# Beside Ray's container in the pod of a head: the autoscaler; on its machine also a submitter.
BESIDE_HEAD = {"cpus": 1.0, "memory": 2.0}
# Beside Ray's container in each pod: what keeps its logs.
SIDECAR = {"cpus": 0.1, "memory": 0.125}


@dataclass(frozen=True)
class Room:
    """CPUs, and GiB of memory and disk."""

    cpus: float
    memory: float
    disk: float


def allocatable(cloud: str, machine: dict[str, Any], disk: float) -> Room:
    """What the scheduler may give away of a machine with a disk of so many GiB."""
    seen = machine["memory"] * (1 - _UNSEEN[cloud])
    if cloud == "aws":
        kept = (255 + 11 * machine["pods"]) / 1024
        disk_kept = 1.0
    else:
        kept = _shares(seen, [(4, 0.25), (4, 0.20), (8, 0.10), (112, 0.06)], 0.02)
        disk_kept = min(disk / 2, 6 + 0.35 * disk, 100)
    cpus = machine["cpus"] - _shares(machine["cpus"], [(1, 0.06), (1, 0.01), (2, 0.005)], 0.0025)
    return Room(cpus, seen - kept - 100 / 1024, disk - disk_kept - disk / 10)


def _shares(amount: float, steps: list[tuple[float, float]], rest: float) -> float:
    """A share of each step of an amount, and another one of what is left."""
    total = 0.0
    for width, share in steps:
        part = min(amount, width)
        total += part * share
        amount -= part
    return total + amount * rest


def misfits(sizes: dict[str, Any]) -> list[str]:
    """Each pod that does not fit its machine, in one line that says what to lower."""
    lines = []
    for name, size in {"head": sizes["head"], **sizes["groups"]}.items():
        beside = [DAEMONS, SIDECAR, *([BESIDE_HEAD] if name == "head" else [])]
        for cloud in ("aws", "gcp"):
            room = allocatable(cloud, sizes["machines"][size[cloud]], size["disk"])
            for what, unit in (("cpus", "CPUs"), ("memory", "GiB"), ("disk", "GiB of disk")):
                left = getattr(room, what) - sum(part.get(what, 0) for part in beside)
                if size["pod"][what] > left:
                    lines.append(
                        f"{name}: pod.{what}={size['pod'][what]}, and {size[cloud]} leaves "
                        f"{math.floor(left * 10) / 10} {unit}: lower it, or take a larger machine"
                    )
    return lines
