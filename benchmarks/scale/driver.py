"""Measure the driver's cost as tables, chunks and machines grow.

    python benchmarks/scale/driver.py [--quick]

    commits   tables of 1,000, 10,000, 100,000 commit files: seconds to list pending chunks and to
              count rows, and the driver's memory; each in its own process
    chunks    256, 1,024, 4,096 empty chunks through the jobs' runner on a local Ray: chunks per
              second, and the driver's memory
    nodes     the same 1,024 chunks on a local cluster of 1, 4, 8 nodes (processes on this machine,
              nominally one CPU each): whether nodes cost the driver time

Nothing is downloaded or computed: this is the pipeline's own overhead. The last line is JSON. For the
conclusions see docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, too
from pipelines.execution.chunks import run_chunks
from pipelines.execution.connection import RayConfig, ray_session
from pipelines.execution.steps import Chunk, PlacedStep
from pipelines.storage.tables import Commit, Table

_ROWS = 256  # rows per chunk, according to its commit


def alone(work: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """The result of `work` in a new process, with its peak memory in MB after the work
    (`memory_mb`) and before (`imports_mb`)."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, sender))
    process.start()
    sender.close()  # only the child's copy is left, so recv() fails when the child dies
    try:
        result: dict[str, float] = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{work} ended with status {process.exitcode}") from None
    process.join()
    return result


def _report(work: Callable[[], Mapping[str, float]], sender: Any) -> None:
    before = _peak()
    result = work()
    sender.send({**result, "memory_mb": _peak(), "imports_mb": before})


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def declare_written(table: Table, chunks: Iterable[int], rows: int, **statuses: int) -> None:
    """Write commits of `rows` rows each for chunks without parts."""
    for chunk in chunks:
        commit = Commit(chunk, rows, statuses).to_json()
        (table.folder / "_commits" / f"{chunk:06d}.json").write_text(commit)


def write_commits(folder: Path, commits: int) -> Table:
    """A table with commits, but no parts, for every chunk except the last."""
    table = Table(folder)
    table.create("caption", {}, commits + 1)
    declare_written(table, range(commits), _ROWS, ok=_ROWS - 1, failed=1)
    return table


def look(folder: Path) -> dict[str, float]:
    """Seconds of the queries of a table at a job's start and end."""
    table = Table(folder)
    start = time.perf_counter()
    assert len(table.pending()) == 1
    pending = time.perf_counter() - start
    start = time.perf_counter()
    counts = table.counts()
    assert sum(counts.values()) == _ROWS * (table.describe()["chunks"] - 1)
    return {"pending_seconds": pending, "counts_seconds": time.perf_counter() - start}


def pass_chunks(
    chunks: int, address: str | None = None, cpus: int | None = None
) -> dict[str, float]:
    """Seconds for chunks of one row through Ray Data and the driver's bookkeeping.

    A few chunks run first, to start Ray's workers.
    """

    steps = [PlacedStep(_one_row, resources={"num_cpus": 0.5})]
    with ray_session(RayConfig(address=address, num_cpus=cpus, object_store_gb=0.3)) as cluster:
        run = partial(run_chunks, cluster, steps=steps, write=_write, title="scale", done={})
        run(range(32), total_rows=32)
        start = time.perf_counter()
        run(range(chunks), total_rows=chunks)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "chunks_per_second": chunks / seconds}


def _one_row(chunk: Chunk) -> Chunk:
    return replace(chunk, rows=pa.table({"status": ["ok"]}))


def _write(chunk: Chunk) -> None:
    pass


def pass_on_nodes(nodes: int, chunks: int) -> dict[str, float]:
    """`pass_chunks` on a cluster whose head has no CPUs."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=10**8)
        cluster.wait_for_nodes()
        return pass_chunks(chunks, cluster.address)
    finally:
        cluster.shutdown()


def measure(commits: list[int], chunks: list[int], nodes: list[int]) -> dict[str, Any]:
    """All three parts; prints each result to standard error when it is ready."""
    results: dict[str, Any] = {"commits": {}, "chunks": {}, "nodes": {}}

    def note(part: str, number: int, work: Callable[[], dict[str, float]]) -> None:
        figures = {name: float(f"{value:.4g}") for name, value in alone(work).items()}
        results[part][number] = figures
        print(f"{part} {number:,}: {figures}", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        for number in commits:
            table = write_commits(Path(folder) / str(number), number)
            note("commits", number, partial(look, table.folder))
    for number in chunks:
        note("chunks", number, partial(pass_chunks, number, cpus=2))
    for number in nodes:
        note("nodes", number, partial(pass_on_nodes, number, max(chunks[:2])))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the sizes")
    quick = parser.parse_args().quick
    commits = [100, 1_000, 10_000] if quick else [1_000, 10_000, 100_000]
    chunks = [64, 256] if quick else [256, 1_024, 4_096]
    nodes = [1, 2] if quick else [1, 4, 8]
    print(json.dumps({"benchmark": "scale", **measure(commits, chunks, nodes)}))


if __name__ == "__main__":
    # Imported by name, so that spawned processes and Ray's workers find its functions.
    from benchmarks.scale import driver

    driver.main()
