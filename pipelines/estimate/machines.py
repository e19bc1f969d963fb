"""GPUs and machines by name, from machines.yaml: memory, speed, price."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

Arithmetic = Literal["bfloat16", "tf32", "float32"]
"""The arithmetic of matrix products."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: bytes of memory, bytes per second, FLOP/s by arithmetic."""

    name: str
    memory: int
    bandwidth: float
    rates: dict[Arithmetic, float]


@dataclass(frozen=True)
class Machine:
    """A kind of machine; a GPU alone is a machine of one GPU without memory or price."""

    name: str
    gpu: Gpu
    gpus: int
    memory: int | None = None  # bytes
    usd_per_hour: float | None = None


@cache
def _content() -> dict[str, Any]:
    text = Path(__file__).with_name("machines.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def gpus() -> list[Gpu]:
    """All kinds of GPU, in the order of machines.yaml."""
    return [_gpu(name) for name in _content()["gpus"]]


def find_machine(name: str) -> Machine:
    """A machine, or a GPU alone, by name (upper or lower case).

    Raises ValueError, with the nearest names, for an unknown one.
    """
    content = _content()
    names = {known.lower(): known for known in (*content["machines"], *content["gpus"])}
    known = names.get(name.strip().lower())
    if known is None:
        near = difflib.get_close_matches(name.strip().lower(), names, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(names[n] for n in near)}?"
            if near
            else f"expected one of {', '.join(names.values())}"
        )
        raise ValueError(f"there is no machine or GPU '{name}': {hint}")
    if known in content["gpus"]:
        return Machine(known, _gpu(known), 1)
    about = content["machines"][known]
    return Machine(known, _gpu(about["gpu"]), about["gpus"], about["memory"] * 2**30, about["usd"])


def spot_share() -> float:
    """Spot price / price on demand."""
    return float(_content()["spot_share"])


def _gpu(name: str) -> Gpu:
    about = _content()["gpus"][name]
    rates: dict[Arithmetic, float] = {
        kind: about[kind] * 1e12 for kind in ("bfloat16", "tf32", "float32")
    }
    return Gpu(name, int(about["memory"] * 1e9), about["bandwidth"] * 1e9, rates)
