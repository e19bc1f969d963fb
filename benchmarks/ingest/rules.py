"""What the rules of sites cost the downloader: robots.txt and tdmrep.json at 1, 5 and 100 images a host.

    python benchmarks/ingest/rules.py runs/bench-ingest [--images 2000] [--rounds 3] [--latency 0.2]

One downloader fetches photograph-like images from a local server, in turn without and with these two
rules, and drops them: nothing is decoded or written, so this is the most that the rules can cost a job.
Hosts are loopback addresses, so no name is looked up. Prints one line of JSON with medians: images/s, CPU
time of the downloader an image, and requests that the server counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, too
from benchmarks.ingest.throughput import MANY_HOSTS, Case, requests_so_far, served, write_list
from benchmarks.ingest.web import write_photos
from pipelines.ingest.web.config import DownloadConfig
from pipelines.ingest.web.download import Downloader, Fetched

SETTINGS = {"without": ("x_robots_tag", "noml", "tdm_header"), "with": True}


async def _status(fetched: Fetched) -> str:
    return fetched.status


def measure(urls: Sequence[str], rules: Any, base: str) -> dict[str, float]:
    """Fetch `urls` once with a new downloader."""
    config = DownloadConfig(allow_private=True, retries=0, respect_optout=rules)
    downloader = Downloader(config)
    asked, began, cpu = requests_so_far(base), time.perf_counter(), time.process_time()
    statuses = downloader.map_urls(urls, _status)
    seconds, used = time.perf_counter() - began, time.process_time() - cpu
    downloader.close()
    assert set(statuses) == {"ok"}, set(statuses)
    return {
        "images_per_second": len(urls) / seconds,
        "cpu_ms_per_image": 1000 * used / len(urls),
        "requests_per_image": (requests_so_far(base) - asked) / len(urls),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for images and lists")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    given = parser.parse_args(arguments)
    folder = given.folder.absolute()
    write_photos(folder / "photos", 40)
    cases: dict[str, Any] = {}
    for case in MANY_HOSTS:
        with served(folder / "photos", Case(case.name, given.latency)) as base:
            file = write_list(folder / "rules", base, given.images, case.per_host)
            urls = pq.read_table(file)["url"].to_pylist()
            measure(urls[:100], True, base)  # warms up both sides
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
            for _ in range(given.rounds):
                for name, rules in SETTINGS.items():
                    runs[name].append(measure(urls, rules, base))
        cases[case.name] = {name: _medians(measured) for name, measured in runs.items()}
    shown = {"images": given.images, "rounds": given.rounds, "latency": given.latency}
    print(json.dumps({"benchmark": "ingest rules", **shown, "cases": cases}))


def _medians(measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The median of each figure, and the images/s of each round."""
    medians = {name: round(statistics.median(m[name] for m in measured), 2) for name in measured[0]}
    return {**medians, "each_round": [round(m["images_per_second"]) for m in measured]}


if __name__ == "__main__":
    main()
