"""What benchmarks of the driver share: work in a process of its own, and chunks declared written."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipelines.storage.tables import Commit, Table


def alone(work: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """What `work` returns in a new process, with that process's greatest memory in MB: `memory_mb`,
    and `imports_mb`, what it was before the work."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, sender))
    process.start()
    sender.close()  # the child has its own: when it dies, so does the line
    try:
        found: dict[str, float] = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{work} ended with status {process.exitcode}") from None
    process.join()
    return found


def _report(work: Callable[[], Mapping[str, float]], sender: Any) -> None:
    before = _peak()
    found = work()
    sender.send({**found, "memory_mb": _peak(), "imports_mb": before})


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def declare_written(table: Table, chunks: Iterable[int], rows: int, **statuses: int) -> None:
    """Write commits of `rows` rows each for chunks whose parts are not there."""
    for chunk in chunks:
        told = Commit(chunk, rows, statuses).to_json()
        (table.folder / "_commits" / f"{chunk:06d}.json").write_text(told)
