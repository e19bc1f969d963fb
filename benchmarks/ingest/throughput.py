"""Compare ingest's images per second with img2dataset and with decoding alone.

    python benchmarks/ingest/throughput.py runs/bench-ingest [--quick] [--rounds 3] [--cases "200 ms"]

Both fetch the same photograph-like images from the same local server and store them at 512 px
(center_crop, JPEG 95) as Parquet, on all cores, in turn, several times. img2dataset (the "peer") runs
with the fastest of several numbers of processes and threads. The limit is our decoding of the same
bytes in memory, in one single-threaded process per core. Prints JSON of each case and, as the last line,
of all: medians; ratio and share_of_limit are those of the worst case. A case takes about forty minutes.

In the cases with many hosts ingest also runs without the rules that cost requests to each host
(download.respect_optout=x_robots_tag, "ours_without_rules"), and `cost_of_rules` is the share of
ours_without_rules' rate that the rules take. The peer reads no rules. Hosts are loopback addresses, so
no name is looked up.
"""

from __future__ import annotations

import argparse
import io
import ipaddress
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, too
from benchmarks.ingest.web import write_photos
from pipelines.ingest.config import RULES_SETTING
from pipelines.ingest.decoder import image_columns
from pipelines.lists.filters import FilterConfig
from pipelines.pictures.encode import ImageConfig

REPO = Path(__file__).parents[2]
CORES = os.cpu_count() or 1
TIMEOUT = 5  # seconds without an answer, for both
IMAGE = ImageConfig(size=512, resize="center_crop", format="jpeg", quality=95)


@dataclass(frozen=True)
class Case:
    """Behaviour of the server: latency in seconds, and the fraction of URLs that never answer.

    `per_host`: images of each host; None: all images are on one.
    """

    name: str
    latency: float = 0.0
    dead: float = 0.0
    per_host: int | None = None


ONE_HOST = (Case("no latency"), Case("200 ms", 0.2), Case("30 percent dead", 0.0, 0.3))
MANY_HOSTS = tuple(Case(f"{number} a host", per_host=number) for number in (1, 5, 100))
CASES = (*ONE_HOST, *MANY_HOSTS)


@dataclass(frozen=True)
class Measured:
    """One run of one program; CPU time and memory are of all its processes."""

    ok: int
    seconds: float
    cpu_seconds: float
    peak_memory: int  # bytes
    requests: int = 0  # that the server counted

    @property
    def rate(self) -> float:
        return self.ok / self.seconds


class Watch(threading.Thread):
    """Samples CPU time and memory of a process and all its descendants."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(process)
        self.cpu: dict[tuple[int, float], float] = {}
        self.peak = 0
        self.root_peak = 0  # without descendants
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.25):
            memory = 0
            try:
                processes = [self.root, *self.root.children(recursive=True)]
            except psutil.Error:
                return
            for process in processes:
                try:
                    times = process.cpu_times()
                    self.cpu[process.pid, process.create_time()] = times.user + times.system
                    resident = process.memory_info().rss
                except psutil.Error:
                    continue
                memory += resident
                if process is self.root:
                    self.root_peak = max(self.root_peak, resident)
            self.peak = max(self.peak, memory)


def watched(command: Sequence[str], log: Path, **environment: str) -> tuple[float, Watch]:
    """Run a command; returns its seconds, CPU time and memory."""
    start = time.perf_counter()
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=REPO, stdout=output, stderr=output, env={**os.environ, **environment}
        )
        watch = Watch(process.pid)
        watch.start()
        status = process.wait()
    seconds = time.perf_counter() - start
    watch.ended.set()
    watch.join()
    if status:
        raise SystemExit(f"{' '.join(command[:3])} … ended with status {status}: see {log}")
    return seconds, watch


@contextmanager
def served(photos: Path, case: Case) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.ingest.web", str(photos)]
    command += [f"--latency={case.latency}", f"--dead={case.dead}"]
    server = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.kill()
        server.wait()


def write_list(folder: Path, base: str, requests: int, per_host: int | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "list.parquet"
    port = base.rpartition(":")[2]
    urls = []
    for number in range(requests):
        host = ipaddress.ip_address("127.0.0.1") + (number // per_host if per_host else 0)
        urls.append(f"http://{host}:{port}/{number}.jpg")
    pq.write_table(pa.table({"url": urls, "text": ["a photograph"] * requests}), file)
    return file


def requests_so_far(base: str) -> int:
    with urllib.request.urlopen(f"{base}/requests") as answer:
        return int(answer.read())


def ours(folder: Path, urls: Path, *settings: str) -> Measured:
    output = folder / "ours"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "jobs/ingest.py", f"data.input={urls}", f"data.output={output}"]
    command += ["download.allow_private=true"]
    # The peer's limit is the time without an answer: a third of our limit for the whole request.
    command += [f"download.total_timeout={3 * TIMEOUT}"]
    # All images are on one host, unlike in real lists. Repeated photographs are kept.
    command += ["download.retries=0", "download.concurrency_per_host=1000000"]
    command += ["duplicates.by=none", f"image.size={IMAGE.size}", *settings]
    seconds, watch = watched(command, folder / "ours.log", PYTHONPATH=str(REPO))
    commits = [json.loads(file.read_text()) for file in (output / "_commits").iterdir()]
    ok = sum(commit["statuses"].get("ok", 0) for commit in commits)
    return Measured(ok, seconds, sum(watch.cpu.values()), watch.peak)


def peer(folder: Path, urls: Path, processes: int, threads: int) -> Measured:
    output = folder / "peer"
    shutil.rmtree(output, ignore_errors=True)
    rows = pq.read_metadata(urls).num_rows
    command = [str(Path(sys.executable).with_name("img2dataset")), f"--url_list={urls}"]
    command += ["--input_format=parquet", "--url_col=url", "--caption_col=text"]
    command += ["--output_format=parquet", f"--output_folder={output}", "--resize_mode=center_crop"]
    command += [f"--processes_count={processes}", f"--thread_count={threads}", "--retries=0"]
    command += [f"--image_size={IMAGE.size}", f"--encode_quality={IMAGE.quality}"]
    command += [f"--timeout={TIMEOUT}", "--resize_only_if_bigger=True", "--enable_wandb=False"]
    command += [f"--number_sample_per_shard={max(64, min(1000, rows // (4 * processes)))}"]
    seconds, watch = watched(command, folder / "peer.log", NO_ALBUMENTATIONS_UPDATE="1")
    stats = [json.loads(file.read_text()) for file in output.glob("*_stats.json")]
    ok = sum(stat["successes"] for stat in stats)
    return Measured(ok, seconds, sum(watch.cpu.values()), watch.peak)


def best_of_peer(folder: Path, urls: Path) -> tuple[int, int]:
    """The peer's fastest numbers of processes and threads for these requests."""
    rates = {}
    for processes in sorted({CORES, 2 * CORES}):
        for threads in (16, 64, 128):
            rates[processes, threads] = peer(folder, urls, processes, threads).rate
    return max(rates, key=lambda settings: rates[settings])


def _decode(files: list[str]) -> int:
    for file in files:
        row = image_columns(Path(file).read_bytes(), IMAGE, FilterConfig())
        assert row["status"] == "ok", row
    return len(files)


def limit(photos: Path, images: int) -> float:
    """Images per second of decode, resize and encode alone, on all cores."""
    files = [str(file) for file in sorted(photos.glob("*.jpg"))]
    work = [files[i % len(files)] for i in range(images)]
    with ProcessPoolExecutor(CORES) as pool:
        list(pool.map(_decode, [files[:1]] * CORES))  # start the processes
        start = time.perf_counter()
        done = sum(pool.map(_decode, [work[i : i + 20] for i in range(0, images, 20)]))
        return done / (time.perf_counter() - start)


def agreement(folder: Path, pictures: int = 50) -> float:
    """Minimum structural similarity of our and the peer's images of the same URLs.

    Images below the stored size are skipped: ours are cropped to a square, the peer's are not.
    """
    columns = {"ours": "image", "peer": "jpg"}
    urls = {name: _urls(folder / name, column) for name, column in columns.items()}
    both = sorted(set(urls["ours"]) & set(urls["peer"]))[:: max(1, len(urls["ours"]) // pictures)]
    ours, theirs = (
        [_picture(urls[name][url], url, column) for url in both] for name, column in columns.items()
    )
    pairs = zip(ours, theirs, strict=True)
    similarities = (ssim(one, other) for one, other in pairs if one.shape == other.shape)
    return min(similarities, default=math.nan)


def _urls(folder: Path, column: str) -> dict[str, Path]:
    """The file that contains the image of each URL."""
    return {
        url: file
        for file in folder.rglob("*.parquet")
        for url in pq.read_table(file, columns=["url"], filters=pc.field(column).is_valid())[
            "url"
        ].to_pylist()
    }


def _picture(file: Path, url: str, column: str) -> np.ndarray:
    (row,) = pq.read_table(file, columns=[column], filters=pc.field("url") == url).to_pylist()
    data = row[column]["bytes"] if isinstance(row[column], dict) else row[column]
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"), np.float64)


def ssim(one: np.ndarray, other: np.ndarray, window: int = 8) -> float:
    """Mean structural similarity (Wang et al. 2004) of grey images in [0, 255], in 8 x 8 windows."""
    height, width = (side // window * window for side in one.shape)

    def blocks(picture: np.ndarray) -> np.ndarray:
        cut = picture[:height, :width].reshape(height // window, window, width // window, window)
        return cut.transpose(0, 2, 1, 3).reshape(-1, window * window)

    x, y = blocks(one), blocks(other)
    mean_x, mean_y = x.mean(1), y.mean(1)
    covariance = (x * y).mean(1) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similar / ((mean_x**2 + mean_y**2 + c1) * (x.var(1) + y.var(1) + c2))).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder for images, lists and tables")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="1,500 requests, one round, and no search for the peer's best settings",
    )
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--requests", type=int, help="default: 20,000")
    names = [case.name for case in CASES]
    parser.add_argument(
        "--cases", nargs="+", choices=names, metavar="CASE",
        help=f"behaviour of the server: {', '.join(names)}; default: all, the first if --quick",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    requests = given.requests or (1_500 if given.quick else 20_000)
    rounds = given.rounds or (1 if given.quick else 3)
    wanted = given.cases or (names[:1] if given.quick else names)
    cases = [case for case in CASES if case.name in wanted]
    folder = given.folder.absolute()
    write_photos(folder / "photos", 40 if given.quick else 200)
    results: dict[str, Any] = {}
    for case in cases:
        with served(folder / "photos", case) as base:
            urls = write_list(folder / "sweep", base, requests // 10, case.per_host)
            processes, threads = (CORES, 64) if given.quick else best_of_peer(folder, urls)
            urls = write_list(folder, base, requests, case.per_host)
            programs: dict[str, Callable[[], Measured]] = {
                "ours": partial(ours, folder, urls),
                "peer": partial(peer, folder, urls, processes, threads),
            }
            if case in MANY_HOSTS:
                without = partial(ours, folder, urls, f"{RULES_SETTING}=x_robots_tag")
                programs = {"ours_without_rules": without, **programs}
            runs: dict[str, list[Measured]] = {name: [] for name in programs}
            limits = []
            for _ in range(rounds):
                for name, program in programs.items():
                    before = requests_so_far(base)
                    measured = program()
                    asked = requests_so_far(base) - before
                    runs[name].append(replace(measured, requests=asked))
                limits.append(limit(folder / "photos", min(requests, 1_000)))
        results[case.name] = summarise(case, runs, limits, processes, threads)
        print(json.dumps({case.name: results[case.name]}), flush=True)
        results[case.name]["ssim"] = round(agreement(folder), 4)
    worst = {
        "ratio": min(case["ratio"] for case in results.values()),
        "share_of_limit": min(case["share_of_limit"] for case in results.values()),
    }
    print(
        json.dumps(
            {"benchmark": "ingest", "requests": requests, "cores": CORES, **worst, "cases": results}
        )
    )


def summarise(
    case: Case, runs: dict[str, list[Measured]], limits: list[float], processes: int, threads: int
) -> dict[str, Any]:
    """Medians of a case, and our ratio to the peer and share of the limit."""
    figures: dict[str, Any] = {"peer_settings": f"{processes} processes, {threads} threads"}
    for name, measured in runs.items():
        figures[name] = {
            "images_per_second": round(statistics.median(m.rate for m in measured), 1),
            "cpu_ms_per_image": round(
                statistics.median(1000 * m.cpu_seconds / max(m.ok, 1) for m in measured), 1
            ),
            "peak_memory_mb": round(statistics.median(m.peak_memory for m in measured) / 1e6),
            "ok": measured[-1].ok,
            "requests": measured[-1].requests,
            "seconds": [round(m.seconds, 1) for m in measured],
        }
    figures["limit"] = round(statistics.median(limits), 1)
    rate = figures["ours"]["images_per_second"]
    figures["ratio"] = round(rate / figures["peer"]["images_per_second"], 3)
    figures["share_of_limit"] = round(rate / figures["limit"], 3)
    if without := figures.get("ours_without_rules"):
        figures["cost_of_rules"] = round(1 - rate / without["images_per_second"], 3)
    return figures


if __name__ == "__main__":
    main()
