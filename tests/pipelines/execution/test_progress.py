"""What a job says of its rows."""

import io
from contextlib import redirect_stderr

from pipelines.execution.progress import RowBar, counts_table, summary


def test_the_bar_tells_rates_of_this_attempt_alone() -> None:
    now = 100.0
    said = io.StringIO()
    with redirect_stderr(said), RowBar("recaption", 40, {"ok": 10}, clock=lambda: now) as bar:
        # The model's start is before the first chunk, of which nobody knows when it was begun.
        bar.update({"ok": 9, "decode:corrupt": 1}, {"tokens": 700}, busy=1.0, present=1.0)
        now += 4
        bar.update({"ok": 10}, {"tokens": 200}, busy=2.0, present=3.0)
    last = said.getvalue().rsplit("\r", 1)[-1]
    assert "30/40" in last
    assert "ok 97% | decode:corrupt 1 | 50 tokens/s | actors busy 75%" in last


def test_a_job_without_a_model_tells_counts_alone() -> None:
    said = io.StringIO()
    with redirect_stderr(said), RowBar("ingest", 4, {}) as bar:
        bar.update({"download:timeout": 1, "ok": 3}, {})
    assert said.getvalue().rsplit("\r", 1)[-1].rstrip().endswith("ok 75% | download:timeout 1]")


def test_most_frequent_failures_come_first() -> None:
    counts = {"ok": 94, "a": 1, "b": 3, "c": 2, "d": 0}
    assert summary(counts) == "ok 94% | b 3, c 2, a 1"
    assert counts_table({"ok": 3, "decode:corrupt": 1}).splitlines() == [
        "ok                      3   75.0%",
        "decode:corrupt          1   25.0%",
        "total                   4",
    ]


def test_no_bar_is_shown_before_the_first_chunk() -> None:
    said = io.StringIO()
    with redirect_stderr(said), RowBar("recaption", 40, {"ok": 10}):
        pass
    assert said.getvalue() == ""
