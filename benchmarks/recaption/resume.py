"""Measure the driver's time and memory to start and resume recaption, by number of images.

    python benchmarks/recaption/resume.py --rows 100000 1000000 10000000

For each number, plans an image table in ingest's layout (keys and statuses; no pixels, which planning
does not read) and marks half of its chunks as written. Each step runs in its own process:

    plan      the first start: read and check all keys, assign them to chunks
    resume    a later start, until the first chunk is submitted
    task      what one task reads to find its chunk

Excludes the start of Ray and the models, which do not depend on the table. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, too
from benchmarks.scale.driver import alone, declare_written
from pipelines.execution.connection import RayConfig
from pipelines.execution.image_job import ActorConfig, ImageJob
from pipelines.images.plans import plan_index, read_plan
from pipelines.images.rows import CAPTION_ROW, IMAGE_STRUCT
from pipelines.images.selection import Selection
from pipelines.storage.locks import lock_folder
from pipelines.storage.tables import IMAGE_ROW_GROUP, Table
from vlv_model.squares import Square

_PART = 4096  # rows per part of the image table


def write_images(folder: Path, rows: int) -> None:
    """A finished image table of `rows` rows with unique, evenly spread keys."""
    table = Table(folder)
    table.create("image", {}, -(-rows // _PART))
    step = 2**64 // rows
    for chunk, start in enumerate(range(0, rows, _PART)):
        numbers = np.arange(start, min(start + _PART, rows))
        keys = (numbers.astype(np.uint64) * np.uint64(step)).view(np.int64)
        columns = {
            "key": keys,
            "url": [f"http://example.org/{number}.jpg" for number in numbers.tolist()],
            "image": pa.nulls(len(keys), IMAGE_STRUCT),
            "status": pa.array(["ok"] * len(keys)),
        }
        table.write(chunk, pa.table(columns), row_group_size=IMAGE_ROW_GROUP)


def write_half(table: Table, rows_per_chunk: int) -> None:
    """Mark every second chunk of a caption table as written; only the first has a part."""
    chunks = table.describe()["chunks"]
    pq.write_table(CAPTION_ROW.empty_table(), table.part(0))
    declare_written(table, range(0, chunks, 2), rows_per_chunk, ok=rows_per_chunk)


def opened(selection: Selection) -> Table:
    """The table, opened as jobs/recaption.py does."""
    job = ImageJob(
        kind="caption", data=selection, identity={"model": "f"}, square=Square(64), step=object,
        arguments=(), actors=ActorConfig(), ray=RayConfig(), title="captions",
        columns=CAPTION_ROW.names, notes={"parts": "data"},
    )  # fmt: skip
    table = Table(selection.output)
    job.check(table)
    with lock_folder(table.folder, "data.output"):
        job.plan(table)
    return table


def plan(selection: Selection) -> None:
    opened(selection)


def resume(selection: Selection) -> None:
    table = opened(selection)
    table.pending()
    table.counts()


def task(selection: Selection) -> None:
    table = Table(selection.output)
    files = [Path(file) for file in table.describe()["files"]]
    plan_index(files, read_plan(table.folder, 1))


def timed(work: Callable[[Selection], None], selection: Selection) -> dict[str, float]:
    start = time.perf_counter()
    work(selection)
    return {"seconds": round(time.perf_counter() - start, 3)}


def apart(work: Callable[[Selection], None], selection: Selection) -> dict[str, float]:
    """Seconds of `work` in a new process, and its peak memory in MB above that of the imports."""
    result = alone(partial(timed, work, selection))
    above_imports = round(result["memory_mb"] - result["imports_mb"], 1)
    return {"seconds": result["seconds"], "megabytes": above_imports}


def measure(rows: int, rows_per_chunk: int, folder: Path) -> dict[str, float]:
    """One line of the result."""
    write_images(folder / "images", rows)
    selection = Selection(
        input=str(folder / "images"), output=str(folder / "captions"), rows_per_chunk=rows_per_chunk
    )
    line: dict[str, float] = {"rows": rows}
    for name, work in (("plan", plan), ("resume", resume), ("task", task)):
        if work is resume:
            write_half(Table(selection.output), rows_per_chunk)
        for what, value in apart(work, selection).items():
            line[f"{name}_{what}"] = value
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rows-per-chunk", type=int, default=256)
    arguments = parser.parse_args()
    lines = []
    for rows in arguments.rows:
        folder = Path(tempfile.mkdtemp(prefix="vlv-resume-"))
        try:
            lines.append(measure(rows, arguments.rows_per_chunk, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print("  ".join(f"{name} {value:,}" for name, value in lines[-1].items()), flush=True)
    print(json.dumps({"benchmark": "resume", "tables": lines}))


if __name__ == "__main__":
    main()
