"""The progress of a job in rows: the bar while it runs, the counts at its end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType

from tqdm import tqdm

from pipelines.cli.waiting import waiting


class RowBar:
    """A bar of a table's rows, with counts by status and rates of other figures.

    It starts at `done`, the rows by status of earlier attempts. Rates and shares cover this attempt, from
    its first chunk on, so that start-up does not count; `clock` returns seconds. Until that chunk a
    terminal shows what is waited for instead: `start` … 12 s.
    """

    def __init__(
        self,
        title: str,
        total_rows: int,
        done: Mapping[str, int],
        start: str = "starting workers",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.statuses = Counter(done)
        self._title, self._total = title, total_rows
        self._start = ExitStack()
        self._waiting = waiting(start)
        self._clock = clock
        self.sums = Counter[str]()
        self.busy = self.present = 0.0
        self._first: float | None = None  # when the first chunk came
        self._bar: tqdm | None = None

    def __enter__(self) -> RowBar:
        self._start.enter_context(self._waiting)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._start.close()
        if self._bar is not None:
            self._bar.close()

    def update(
        self,
        statuses: Mapping[str, int],
        sums: Mapping[str, float],
        busy: float = 0.0,
        present: float = 0.0,
    ) -> None:
        """Count a committed chunk: sums to show as rates, and an actor's seconds (see Chunk)."""
        self.statuses.update(statuses)
        if self._first is None:
            self._first = self._clock()
        else:
            self.sums.update(sums)
        self.busy, self.present = self.busy + busy, self.present + present
        words = [summary(self.statuses), *self._rates(self._clock() - self._first)]
        if self._bar is None:
            self._start.close()
            rows = sum(self.statuses.values())
            self._bar = tqdm(total=self._total, initial=rows, desc=self._title, unit="row")
            self._bar.set_postfix_str(" | ".join(words))
            return
        self._bar.set_postfix_str(" | ".join(words), refresh=False)
        self._bar.update(sum(statuses.values()))

    def _rates(self, seconds: float) -> list[str]:
        words = [f"{n / seconds:,.0f} {name}/s" for name, n in self.sums.items() if seconds]
        if self.present:
            words.append(f"actors busy {self.busy / self.present:.0%}")
        return words


def summary(statuses: Mapping[str, int]) -> str:
    """Counts by status in one line: `ok 94% | download:http_404 12, decode:broken 3`."""
    total = sum(statuses.values())
    if not total:
        return ""
    failures = [(n, s) for s, n in statuses.items() if s != "ok" and n]
    failures.sort(reverse=True)
    words = ", ".join(f"{status} {n}" for n, status in failures[:3])
    share = f"ok {statuses.get('ok', 0) / total:.0%}"
    return f"{share} | {words}" if words else share


def counts_table(statuses: Mapping[str, int]) -> str:
    """Counts by status and their shares, a line each."""
    total = sum(statuses.values())
    width = max([len(name) for name in statuses] + [5])
    lines = [f"{name:<{width}}  {n:>9,}  {n / total:6.1%}" for name, n in statuses.items()]
    return "\n".join([*lines, f"{'total':<{width}}  {total:>9,}"])
