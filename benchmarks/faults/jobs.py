"""The jobs that benchmarks/faults/chaos.py disturbs: their inputs, commands and expected rows."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.faults.counting import Count, count
from benchmarks.faults.kinds import REPO, run_in_thread
from benchmarks.faults.targets import TARGETS, Target
from benchmarks.ingest.web import Site, write_photos
from pipelines.images.rows import IMAGE_ROW
from pipelines.tiny_world import scenes
from pipelines.tiny_world.pretrained import FOLDER, STAGE1

COMMON = ("ray.num_cpus=2", "ray.object_store_gb=0.3")


def count_table(table: Path, undisturbed: Path, job: Job) -> Count:
    """Compare a finished table with the input and with an undisturbed run's."""
    return count(table, undisturbed, job.column, job.expected)


@dataclass(frozen=True)
class Job:
    """A job to disturb. `command(output)` is the command line that writes its table or run."""

    command: Callable[[str], list[str]]
    before: Callable[[str], list[list[str]]]  # commands that create the table to continue
    expected: Sequence[Any]  # the input's values of `column`; the steps of a run
    span: float  # longest time between a commit and a fault, in seconds
    column: str = "key"  # identifies a row of the input
    pace: Callable[[float], None] = field(default=lambda rate: None)
    """Limits the input to a number of rows per second; 0: no limit."""
    target: Callable[[Path], Target] = Target
    targets: Mapping[str, Callable[[Path], AbstractContextManager[Target]]] = field(
        default_factory=lambda: TARGETS
    )  # by the fault that each can inject
    compare: Callable[[Path, Path, Job], Any] = count_table
    faults: Sequence[str] = ("driver", "group", "worker", "head")  # default kinds


def ingest(folder: Path, rows: int, again: bool = False) -> Job:
    """Ingest of photographs from a local web server with 8 % broken links.

    With `again`: a rerun with a longer list, one more filter, and retries of status 500.
    """
    write_photos(folder / "photos", 24)
    site = Site(folder / "photos", dead=0.002, broken=0.08, copies=2)
    port = run_in_thread(site.start)
    urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(rows)]
    scores = np.random.default_rng(0).uniform(4, 8, rows).round(3)
    lists = {"half": rows // 2, "whole": rows}
    for name, length in lists.items():
        columns = {"URL": urls[:length], "aesthetic": scores[:length]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")

    def command(name: str, output: str, *more: str) -> list[str]:
        line = [sys.executable, "jobs/ingest.py", f"data.input={folder / name}.parquet"]
        line += [f"data.output={output}", "download.allow_private=true", "download.concurrency=16"]
        line += ["download.retries=0", "image.size=64", "rows_per_chunk=8", *COMMON, *more]
        return line

    def pace(rate: float) -> None:
        site.rate = rate

    more = ("filter.min_aesthetic=5", "retry=http_5xx")
    return Job(
        command=lambda output: command("whole", output, *(more if again else ())),
        before=lambda output: [command("half", output)] if again else [],
        column="url",
        faults=("driver", "group", "worker", "decoder", "head"),
        # A rerun keeps (and marks) the rows of the first list, and fetches new rows that pass.
        expected=[
            url for i, url in enumerate(urls) if not again or i < lists["half"] or scores[i] >= 5
        ],
        span=6.0,
        pace=pace,
    )


def recaption(folder: Path, rows: int) -> Job:
    """Recaption of drawn scenes by a barely trained captioner; the captions do not matter."""
    images, model = folder / "images.parquet", folder / "stage2"
    keys = drawn_pairs(images, rows)
    if not (model / "result.json").exists():
        command = [sys.executable, "jobs/stage2.py", f"data.input={images}", f"run_dir={model}"]
        command += [f"model.path={FOLDER / STAGE1}", "train.steps=40", "train.num_workers=1"]
        command += ["train.use_gpu=false", "train.global_batch_size=32", "train.wandb=disabled"]
        command += ["train.samples=0", "train.learning_rate=0.002", "train.eval_rows=8", *COMMON]
        subprocess.run(command, cwd=REPO, check=True, env=environment(folder))

    def caption(output: str) -> list[str]:
        line = [sys.executable, "jobs/recaption.py", f"data.input={images}"]
        line += [f"data.output={output}", f"model.path={model}"]
        line += ["generate.num_beams=4", "generate.max_new_tokens=48"]
        # Small chunks: many commits to hit, but not so many that the job does nothing else.
        line += [f"data.rows_per_chunk={max(4, rows // 1000)}", "actors.use_gpu=false", *COMMON]
        return line

    return Job(caption, lambda output: [], keys, span=8.0)


def drawn_pairs(file: Path, rows: int) -> list[int]:
    """Write scenes with captions to a Parquet file in our layout; returns the keys."""
    table = []
    for number, scene in enumerate(scenes.sample(1, rows)):
        buffer = io.BytesIO()
        scenes.draw(scene, number).save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
        about = {"caption": scenes.caption(scene), "status": "ok"}
        table.append({"key": number * 7919, "url": f"http://x/{number}", "image": image, **about})
    schema = IMAGE_ROW.append(pa.field("caption", pa.string()))
    pq.write_table(pa.Table.from_pylist(table, schema), file, row_group_size=16)
    return [row["key"] for row in table]


def environment(folder: Path) -> dict[str, str]:
    """The environment of a job's processes: no other Ray cluster, no hub, own temporary folder."""
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    variables |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    variables |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return variables


JOBS: dict[str, Callable[[Path, int], Job]] = {
    "ingest": ingest,
    "rerun": lambda folder, rows: ingest(folder, rows, again=True),
    "recaption": recaption,
}
