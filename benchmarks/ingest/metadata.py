"""Measure rows per second and memory of reading, filtering and planning URL lists.

    python benchmarks/ingest/metadata.py runs/bench-metadata [--quick]
    python benchmarks/ingest/metadata.py runs/bench-metadata --flat [--quick]

Lists have 100 k, 1 M and 10 M synthetic rows in LAION's format (benchmarks/ingest/lists.py), unsorted
and sorted by score. Each step runs in its own process; planning needs no workers. `--flat` runs whole
ingests of 10 k, 100 k and 1 M rows on Ray, with real tables, deduplication and reports, but with an actor
that makes up small images instead of fetching. The last line is JSON. Memory is the peak of all
processes together; shared pages count once per process.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, too
from benchmarks.ingest.lists import write_list
from benchmarks.ingest.throughput import REPO, watched
from pipelines.cli.config import build
from pipelines.ingest import job
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.plan import Plan, passing
from pipelines.ingest.steps import image_rows
from pipelines.lists.filters import FilterConfig
from pipelines.lists.input_files import input_files
from pipelines.lists.metadata import read_batches

ROWS = (100_000, 1_000_000, 10_000_000)
FLAT_ROWS = (100, 10_000, 100_000, 1_000_000)  # the first measures the start-up
FILTERS: dict[str, Any] = {
    "min_aesthetic": 6,
    "max_pwatermark": 0.5,
    "max_punsafe": 0.5,
    "min_short_side": 512,
    "min_aspect_ratio": 0.5,
    "max_aspect_ratio": 2,
}
_DEAD = 0.35
_COPIES = 50  # one image in so many may be a copy of another


# ------------------------------------------------------------------- steps, in their own process


def config_of(folder: Path, urls: Path, **filters: Any) -> IngestConfig:
    data = {"input": str(urls), "output": str(folder / "table")}
    return build(IngestConfig, {"data": data, "filter": filters})


def start(folder: Path, urls: Path) -> int:
    return 0


def read(folder: Path, urls: Path) -> int:
    batches = (b for f in input_files(str(urls)) for b in read_batches(f, {}, FilterConfig()))
    return sum(batch.num_rows for batch in batches)


def filter_rows(folder: Path, urls: Path) -> int:
    plan = Plan()
    files = input_files(str(urls))
    for _ in passing(files, FilterConfig(**FILTERS), {}, plan, Counter(), Counter()):
        pass
    return plan.read


def plan(folder: Path, urls: Path) -> int:
    return job.plan_only(config_of(folder, urls, **FILTERS)).read


def plan_all(folder: Path, urls: Path) -> int:
    return job.plan_only(config_of(folder, urls)).read


def ingest(folder: Path, urls: Path) -> int:
    job.ImageFetcher = PictureMaker  # type: ignore[misc, assignment]
    for name in ("_plan_into", "run_chunks", "mark_duplicates", "write_link_rot", "write_report"):
        setattr(job, name, _timed(getattr(job, name)))
    shutil.rmtree(folder / "table", ignore_errors=True)
    return sum(job.ingest(config_of(folder, urls)).values())


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*values: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = function(*values, **options)
        parts[function.__name__] = round(time.perf_counter() - begun, 2)
        return result

    return timed


parts: dict[str, float] = {}  # seconds of an ingest by what it does


STEPS: dict[str, Callable[[Path, Path], int]] = {
    step.__name__: step for step in (start, read, filter_rows, plan, plan_all, ingest)
}


class PictureMaker:
    """Replaces ImageFetcher: makes up rows instead of downloading."""

    def __init__(self, *settings: Any) -> None:
        self.noise = np.random.default_rng(0).bytes(2_000)

    def __call__(self, rows: pa.Table) -> pa.Table:
        keys = rows["key"].to_numpy()
        ok = np.random.default_rng(abs(int(keys[0]))).random(len(keys)) >= _DEAD
        images = [self._row(int(key) if good else None) for key, good in zip(keys, ok, strict=True)]
        return image_rows(rows, images)

    def _row(self, key: int | None) -> dict[str, Any]:
        if key is None:
            return {"status": "download:dns", "error": "no such host"}
        # The fraction of copies does not depend on the number of rows.
        content = f"{key % 2**64 if key % _COPIES else key % (1000 * _COPIES):016x}"
        return {
            "status": "ok",
            "image": {"bytes": self.noise + key.to_bytes(8, "big", signed=True), "path": None},
            **dict.fromkeys(("width", "height", "original_width", "original_height"), 512),
            "sha256": 4 * content,
            "phash": content,
        }


# ------------------------------------------------------------------------------------- measuring


def measured(step: str, folder: Path, urls: Path) -> dict[str, float]:
    """Time and memory of one step on a list; `seconds` is without the start of the process."""
    log = folder / f"{step}.log"
    command = [sys.executable, __file__, str(folder), "--step", step, "--list", str(urls)]
    seconds, watch = watched(command, log, OMP_NUM_THREADS="1", PYTHONPATH=str(REPO))
    result = json.loads(log.read_text().splitlines()[-1])
    return {
        "rows": result["rows"],
        "seconds": round(result["seconds"], 2),
        "all_seconds": round(seconds, 2),
        "cpu_seconds": round(sum(watch.cpu.values()), 2),
        "driver_mb": round(watch.root_peak / 1e6),
        "peak_mb": round(watch.peak / 1e6),
        **result["parts"],
    }


def growth(runs: Sequence[dict[str, float]], value: str) -> float:
    """Increase of a value per row, between the two longest lists."""
    short, long = runs[-2:]
    return (long[value] - short[value]) / (long["rows"] - short["rows"])


def lists(folder: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """Figures of each step, for lists of all sizes and orders."""
    steps: dict[str, Any] = {}
    for order in ("random", "score"):
        urls = {n: write_list(folder / f"list-{n}-{order}", n, order) for n in sizes}
        for step in ("read", "filter_rows", "plan", "plan_all"):
            runs = [measured(step, folder, urls[rows]) for rows in sizes]
            steps[f"{step}, {order}"] = {
                "rows_per_second": [round(one["rows"] / one["seconds"]) for one in runs],
                "cpu_seconds": [one["cpu_seconds"] for one in runs],
                "peak_mb": [one["peak_mb"] for one in runs],
                "bytes_per_row": round(1e6 * growth(runs, "peak_mb"), 1),
            }
            print(json.dumps({f"{step}, {order}": steps[f"{step}, {order}"]}), flush=True)
    base = measured("start", folder, urls[sizes[0]])
    return {
        "rows": list(sizes),
        "start_mb": base["peak_mb"],
        "rows_per_second": steps["plan, random"]["rows_per_second"][-1],
        "bytes_per_row": max(step["bytes_per_row"] for step in steps.values()),
        "steps": steps,
    }


def flat(folder: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """Figures of whole ingests; time per row should not grow with the number of rows."""
    runs = []
    for rows in sizes:
        runs.append(measured("ingest", folder, write_list(folder / f"list-{rows}-random", rows)))
        print(json.dumps(runs[-1]), flush=True)
        shutil.rmtree(folder / "table", ignore_errors=True)
    first, *others = runs
    per_row = [
        (one["seconds"] - first["seconds"]) / (one["rows"] - first["rows"]) for one in others
    ]
    return {
        "rows": [one["rows"] for one in others],
        "start_seconds": first["seconds"],
        "ms_per_row": [round(1000 * one["seconds"] / one["rows"], 3) for one in others],
        "ms_per_row_without_start": [round(1000 * seconds, 3) for seconds in per_row],
        "growth": round(per_row[-1] / per_row[-2], 3),
        "driver_mb": [one["driver_mb"] for one in others],
        "peak_mb": [one["peak_mb"] for one in others],
        "driver_bytes_per_row": round(1e6 * growth(runs, "driver_mb"), 1),
        "bytes_per_row": round(1e6 * growth(runs, "peak_mb"), 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for lists and tables")
    parser.add_argument("--flat", action="store_true", help="run whole ingests without fetching")
    parser.add_argument("--quick", action="store_true", help="skip the longest list")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--list", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    folder = given.folder.absolute()
    if given.step:
        begun = time.perf_counter()
        rows = STEPS[given.step](folder, given.list)
        seconds = time.perf_counter() - begun
        print(json.dumps({"rows": rows, "seconds": seconds, "parts": parts}))
        return
    folder.mkdir(parents=True, exist_ok=True)
    measure, sizes = (flat, FLAT_ROWS) if given.flat else (lists, ROWS)
    figures = measure(folder, sizes[:-1] if given.quick else sizes)
    print(json.dumps({"benchmark": "metadata", "mode": measure.__name__, **figures}))


if __name__ == "__main__":
    main()
