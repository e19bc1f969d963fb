"""Helpers for benchmarks of the driver: run work in its own process, fake written chunks."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipelines.storage.tables import Commit, Table


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
