"""Images per second of ingest, against img2dataset and against the decoding alone.

    python benchmarks/ingest/throughput.py runs/bench-ingest [--quick] [--rounds 3] [--cases "200 ms"]

The same requests for photograph-like images from the same local server, stored at 512 px
(center_crop, JPEG 95) as Parquet, on all cores; ours and the peer in turn, several times. The
peer's numbers of processes and threads are swept first and its best is taken. The limit is our own
decoding of the same bytes in memory, in one single-threaded process for each core. Prints a table
and, as the last line, JSON: medians, and of ratio and share the worst case. A case takes some forty minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
from pipelines.ingest.decoder import image_columns
from pipelines.lists.filters import FilterConfig
from pipelines.pictures.encode import ImageConfig

REPO = Path(__file__).parents[2]
CORES = os.cpu_count() or 1
TIMEOUT = 5  # seconds without an answer, for both
IMAGE = ImageConfig(size=512, resize="center_crop", format="jpeg", quality=95)


@dataclass(frozen=True)
class Case:
    """What the server is like."""

    name: str
    latency: float = 0.0
    dead: float = 0.0


CASES = (Case("no latency"), Case("200 ms", 0.2), Case("30 percent dead", 0.0, 0.3))


@dataclass(frozen=True)
class Measured:
    """One run of one of the two."""

    ok: int
    seconds: float
    cpu_seconds: float  # of all its processes
    peak_memory: int  # bytes of all its processes together

    @property
    def rate(self) -> float:
        return self.ok / self.seconds


class Watch(threading.Thread):
    """Adds up what a process and all of its descendants take."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(process)
        self.cpu: dict[tuple[int, float], float] = {}
        self.peak = 0
        self.root_peak = 0  # of the process alone
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.25):
            memory = 0
            try:
                family = [self.root, *self.root.children(recursive=True)]
            except psutil.Error:
                return
            for process in family:
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
    """Run a command to its end; the seconds that it took, and what it took of the machine."""
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


def write_list(folder: Path, base: str, requests: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "list.parquet"
    urls = [f"{base}/{number}.jpg" for number in range(requests)]
    pq.write_table(pa.table({"url": urls, "text": ["a photograph"] * requests}), file)
    return file


def ours(folder: Path, urls: Path) -> Measured:
    output = folder / "ours"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "jobs/ingest.py", f"data.input={urls}", f"data.output={output}"]
    command += ["download.allow_private=true"]
    # As the peer's, of each step: of a whole request it has none, and ours stays at its default.
    command += [f"download.connect_timeout={TIMEOUT}", f"download.read_timeout={TIMEOUT}"]
    # One host has all images here, which no real list has; photographs repeat, and stay.
    command += ["download.retries=0", "download.concurrency_per_host=1000000"]
    command += ["duplicates.by=none", f"image.size={IMAGE.size}"]
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
    tried = {}
    for processes in sorted({CORES, 2 * CORES}):
        for threads in (16, 64, 128):
            tried[processes, threads] = peer(folder, urls, processes, threads).rate
    return max(tried, key=lambda settings: tried[settings])


def _decode(files: list[str]) -> int:
    for file in files:
        row = image_columns(Path(file).read_bytes(), IMAGE, FilterConfig())
        assert row["status"] == "ok", row
    return len(files)


def limit(photos: Path, images: int) -> float:
    """Images per second of our decode, resize and encode alone, on all cores."""
    files = [str(file) for file in sorted(photos.glob("*.jpg"))]
    work = [files[i % len(files)] for i in range(images)]
    with ProcessPoolExecutor(CORES) as pool:
        list(pool.map(_decode, [files[:1]] * CORES))  # the processes are there
        start = time.perf_counter()
        done = sum(pool.map(_decode, [work[i : i + 20] for i in range(0, images, 20)]))
        return done / (time.perf_counter() - start)


def agreement(folder: Path, pictures: int = 50) -> float:
    """Least structural similarity of ours and the peer's pictures of the same addresses.

    Pictures below the stored size are left out: ours are cropped to a square, the peer's are not.
    """
    columns = {"ours": "image", "peer": "jpg"}
    urls = {name: _urls(folder / name, column) for name, column in columns.items()}
    both = sorted(set(urls["ours"]) & set(urls["peer"]))[:: max(1, len(urls["ours"]) // pictures)]
    mine, theirs = (
        [_picture(urls[name][url], url, column) for url in both] for name, column in columns.items()
    )
    pairs = zip(mine, theirs, strict=True)
    same = (ssim(one, other) for one, other in pairs if one.shape == other.shape)
    return min(same, default=math.nan)


def _urls(folder: Path, column: str) -> dict[str, Path]:
    """The file that has the picture of each address."""
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
    """Mean structural similarity (Wang et al. 2004) over windows of 8x8, of greys in [0, 255]."""
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
    parser.add_argument("folder", type=Path, help="where images, lists and tables are kept")
    parser.add_argument(
        "--quick", action="store_true", help="1,500 requests, no latency, one round"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=20_000)
    names = [case.name for case in CASES]
    parser.add_argument(
        "--cases", nargs="+", choices=names, default=names, metavar="CASE",
        help=f"what the server is like: {', '.join(names)}; default: all",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    requests = 1_500 if given.quick else given.requests
    rounds = 1 if given.quick else given.rounds
    cases = CASES[:1] if given.quick else [case for case in CASES if case.name in given.cases]
    folder = given.folder.absolute()
    write_photos(folder / "photos", 40 if given.quick else 200)
    told: dict[str, Any] = {}
    for case in cases:
        with served(folder / "photos", case) as base:
            urls = write_list(folder / "sweep", base, requests // 10)
            processes, threads = (CORES, 64) if given.quick else best_of_peer(folder, urls)
            urls = write_list(folder, base, requests)
            runs: dict[str, list[Measured]] = {"ours": [], "peer": []}
            limits = []
            for _ in range(rounds):
                runs["ours"].append(ours(folder, urls))
                runs["peer"].append(peer(folder, urls, processes, threads))
                limits.append(limit(folder / "photos", min(requests, 1_000)))
        told[case.name] = _tell(case, runs, limits, processes, threads)
        print(json.dumps({case.name: told[case.name]}), flush=True)
        told[case.name]["ssim"] = round(agreement(folder), 4)
    worst = {
        "ratio": min(case["ratio"] for case in told.values()),
        "share_of_limit": min(case["share_of_limit"] for case in told.values()),
    }
    print(
        json.dumps(
            {"benchmark": "ingest", "requests": requests, "cores": CORES, **worst, "cases": told}
        )
    )


def _tell(
    case: Case, runs: dict[str, list[Measured]], limits: list[float], processes: int, threads: int
) -> dict[str, Any]:
    told: dict[str, Any] = {"peer_settings": f"{processes} processes, {threads} threads"}
    for name, measured in runs.items():
        told[name] = {
            "images_per_second": round(statistics.median(m.rate for m in measured), 1),
            "cpu_ms_per_image": round(
                statistics.median(1000 * m.cpu_seconds / max(m.ok, 1) for m in measured), 1
            ),
            "peak_memory_mb": round(statistics.median(m.peak_memory for m in measured) / 1e6),
            "ok": measured[-1].ok,
            "seconds": [round(m.seconds, 1) for m in measured],
        }
    told["limit"] = round(statistics.median(limits), 1)
    told["ratio"] = round(told["ours"]["images_per_second"] / told["peer"]["images_per_second"], 3)
    told["share_of_limit"] = round(told["ours"]["images_per_second"] / told["limit"], 3)
    return told


if __name__ == "__main__":
    main()
