"""The jobs that benchmarks/faults/chaos.py disturbs: their input, their command, and what a row of them is."""

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
from benchmarks.faults.kinds import REPO, in_thread
from benchmarks.faults.places import PLACES, Place
from benchmarks.ingest.web import Site, write_photos
from pipelines.images.rows import IMAGE_ROW
from pipelines.tiny_world import scenes
from pipelines.tiny_world.pretrained import FOLDER, STAGE1

COMMON = ("ray.num_cpus=2", "ray.object_store_gb=0.3")


def count_table(table: Path, unbroken: Path, job: Job) -> Count:
    """Hold a finished table against the input and against an unbroken run."""
    return count(table, unbroken, job.column, job.expected)


@dataclass(frozen=True)
class Job:
    """A job to be disturbed: `command(place)` writes its table, or its run, there."""

    command: Callable[[str], list[str]]
    before: Callable[[str], list[list[str]]]  # commands that make the table it goes on from
    expected: Sequence[Any]  # the rows of the input, by `column`; the steps of a run
    span: float  # longest time between a commit and a fault, in seconds
    column: str = "key"  # that names a row of the input
    pace: Callable[[float], None] = field(default=lambda rate: None)
    """Tells its input how many rows a second it may give; 0: as many as it can."""
    place: Callable[[Path], Place] = Place
    places: Mapping[str, Callable[[Path], AbstractContextManager[Place]]] = field(
        default_factory=lambda: PLACES
    )  # by the fault that each brings
    compare: Callable[[Path, Path, Job], Any] = count_table
    faults: Sequence[str] = ("driver", "group", "worker", "head")  # that take turns by default


def ingest(folder: Path, rows: int, again: bool = False) -> Job:
    """Of a web of photographs, of which 8 % are broken links; `again`: the rerun of a longer list.

    The rerun has a filter besides, and tries again what answered with status 500, which it mends.
    """
    write_photos(folder / "photos", 24)
    site = Site(folder / "photos", dead=0.002, broken=0.08, copies=2)
    port = in_thread(site.start)
    urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(rows)]
    scores = np.random.default_rng(0).uniform(4, 8, rows).round(3)
    lists = {"half": rows // 2, "whole": rows}
    for name, length in lists.items():
        columns = {"URL": urls[:length], "aesthetic": scores[:length]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")

    def command(name: str, place: str, *more: str) -> list[str]:
        made = [sys.executable, "jobs/ingest.py", f"data.input={folder / name}.parquet"]
        made += [f"data.output={place}", "download.allow_private=true", "download.concurrency=16"]
        made += ["download.retries=0", "image.size=64", "rows_per_chunk=8", *COMMON, *more]
        return made

    def wait(rate: float) -> None:
        site.rate = rate

    more = ("filter.min_aesthetic=5", "retry=http_5xx")
    return Job(
        command=lambda place: command("whole", place, *(more if again else ())),
        before=lambda place: [command("half", place)] if again else [],
        column="url",
        faults=("driver", "group", "worker", "decoder", "head"),
        # A rerun keeps what the first list had and marks it; of new rows it fetches what passes.
        expected=[
            url for i, url in enumerate(urls) if not again or i < lists["half"] or scores[i] >= 5
        ],
        span=6.0,
        pace=wait,
    )


def recaption(folder: Path, rows: int) -> Job:
    """Captions of drawn scenes by a captioner of few steps: what it says does not matter here."""
    images, model = folder / "images.parquet", folder / "stage2"
    keys = drawn_pairs(images, rows)
    if not (model / "result.json").exists():
        command = [sys.executable, "jobs/stage2.py", f"data.input={images}", f"run_dir={model}"]
        command += [f"model.path={FOLDER / STAGE1}", "train.steps=40", "train.num_workers=1"]
        command += ["train.use_gpu=false", "train.global_batch_size=32", "train.wandb=disabled"]
        command += ["train.samples=0", "train.learning_rate=0.002", "train.eval_rows=8", *COMMON]
        subprocess.run(command, cwd=REPO, check=True, env=environment(folder))

    def caption(place: str) -> list[str]:
        made = [sys.executable, "jobs/recaption.py", f"data.input={images}", f"data.output={place}"]
        made += [f"model.path={model}", "generate.num_beams=4", "generate.max_new_tokens=48"]
        # Small, so that there are many commits to hit; not so many that they are all that it does.
        made += [f"data.rows_per_chunk={max(4, rows // 1000)}", "actors.use_gpu=false", *COMMON]
        return made

    return Job(caption, lambda place: [], keys, span=8.0)


def drawn_pairs(file: Path, rows: int) -> list[int]:
    """Write scenes and their captions into a Parquet file of our layout; returns the keys."""
    drawn = []
    for number, scene in enumerate(scenes.sample(1, rows)):
        buffer = io.BytesIO()
        scenes.draw(scene, number).save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
        about = {"caption": scenes.caption(scene), "status": "ok"}
        drawn.append({"key": number * 7919, "url": f"http://x/{number}", "image": image, **about})
    schema = IMAGE_ROW.append(pa.field("caption", pa.string()))
    pq.write_table(pa.Table.from_pylist(drawn, schema), file, row_group_size=16)
    return [row["key"] for row in drawn]


def environment(folder: Path) -> dict[str, str]:
    """What the processes of a job know: no other Ray, no hub, temporary files of their own."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    kept |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    kept |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return kept


JOBS: dict[str, Callable[[Path, int], Job]] = {
    "ingest": ingest,
    "rerun": lambda folder, rows: ingest(folder, rows, again=True),
    "recaption": recaption,
}
