"""Tell everything that a first GPU can, part by part, in less than nine minutes.

    python -m benchmarks.gpu [--size full|small|tiny] [--device cuda|cpu] [PART ...]

Needs a CUDA machine with torch and transformers, and pydantic, Pillow, universal_pathlib and diffusers for
most parts; a part whose packages are missing is skipped and says what to install. No network is used:
weights are random. Each part runs in a process of its own with a time limit. Results are printed as they
come; the last line is JSON.
Without a GPU, `--device cpu --size tiny` runs the same code to its end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.children import run_part
from benchmarks.gpu.parts import PARTS

BUDGET = {"cuda": 525.0, "cpu": 7_200.0}  # seconds of all parts together
LEAST = 10.0  # seconds left with which a part still starts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--size", choices=("tiny", "small", "full"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--budget", type=float, help="seconds for all parts; default on CUDA: 525")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.part:
        return run_here(given.part, given.size, given.device, given.result)
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"unknown part '{unknown[0]}': choose from {', '.join(PARTS)}")
    begun, budget = time.monotonic(), given.budget or BUDGET[given.device]
    results: dict[str, dict[str, Any]] = {}
    for name in given.parts or PARTS:
        left = budget - (time.monotonic() - begun)
        part = PARTS[name]
        if reason := part.lacking(given.device):
            results[name] = {"status": "skipped", "reason": reason}
        elif left < LEAST:
            results[name] = {"status": "skipped", "reason": "no time left"}
        else:
            # The parts' limits are those of a GPU.
            limit = min(part.seconds, left) if given.device == "cuda" else left
            results[name] = run_part(name, given.size, given.device, limit)
        print(f"{name}: {words(results[name])}", flush=True)
    seconds = round(time.monotonic() - begun, 1)
    about = {"benchmark": "gpu", "size": given.size, "device": given.device, "seconds": seconds}
    print(json.dumps({**about, "parts": results}))
    return int(any(result["status"] in ("failed", "timeout") for result in results.values()))


def run_here(name: str, size: str, device: str, result: Path) -> int:
    """Run a part in this process and write its figures."""
    import torch

    from benchmarks.gpu.setting import Setting

    if device == "cuda" and not torch.cuda.is_available():
        print("this machine has no CUDA device: give --device cpu --size tiny", file=sys.stderr)
        return 2
    figures = PARTS[name].load()(Setting(size, torch.device(device)))
    result.write_text(json.dumps(figures))
    return 0


def words(result: Mapping[str, Any]) -> str:
    """A result for people: figures in one line, nested ones indented below."""
    plain = [f"{k} {_short(v)}" for k, v in result.items() if not isinstance(v, Mapping)]
    nested = [f"\n    {k}: {words(v)}" for k, v in result.items() if isinstance(v, Mapping)]
    return ", ".join(plain) + "".join(nested)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
