"""Check that the method works: the demo's figures on unseen scenes, over several seeds, with targets.

    python benchmarks/quality/proof.py runs/proof [--full] [--seeds 0 1 2]

Prints one line per figure and, as the last line, JSON. Exit status 1 if a median misses its target.
Repeat the command to continue an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.demo.config import DemoConfig
from pipelines.demo.job import run_demo

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs" / "tiny"
DEFAULT = {"exact_match": 0.80}
FULL = {
    "gap_closed": 0.80,
    "exact_match": 0.95,
    "exact_match_held_out_combinations": 0.80,
    "worst_attribute": 0.98,
    "worst_attribute_held_out_combinations": 0.90,
    "reconstruction_less_ceiling": -0.05,
}


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """The figures with targets, the control's figures, and the seconds."""
    captions, control = summary["captions"], summary["control"]
    pictures = summary["reconstruction"]
    return {
        "gap_closed": summary["denoising"]["gap_closed"],
        "exact_match": captions["exact_match"],
        "exact_match_held_out_combinations": captions["exact_match_held_out_combinations"],
        "worst_attribute": min(captions["attributes"].values()),
        "worst_attribute_held_out_combinations": min(
            captions["attributes_held_out_combinations"].values()
        ),
        "reconstruction_less_ceiling": pictures["attributes"] - pictures["ceiling"],
        "control_exact_match": control["exact_match"],
        "control_exact_match_held_out_combinations": control["exact_match_held_out_combinations"],
        "seconds": sum(summary["seconds"].values()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for the demos")
    parser.add_argument(
        "--full", action="store_true", help="train stage 1 from its pretrained parts"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args(arguments)
    runs = []
    for seed in given.seeds:
        run_dir = str(given.folder / f"{'full' if given.full else 'default'}-{seed}")
        summary = run_demo(DemoConfig(run_dir=run_dir, full=given.full, seed=seed), CONFIGS)
        runs.append(figures(summary))
    targets = FULL if given.full else DEFAULT
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    missed = [name for name, target in targets.items() if medians[name] < target]
    for name, median in medians.items():
        target = f"  target ≥ {targets[name]}" if name in targets else ""
        values = ", ".join(f"{run[name]:.4g}" for run in runs)
        print(f"{name:44} {median:8.4g}  ({values}){target}{'  MISSED' if name in missed else ''}")
    print(
        json.dumps(
            {"benchmark": "proof", "full": given.full, "seeds": given.seeds, **medians}
            | {"missed": missed}
        )
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
