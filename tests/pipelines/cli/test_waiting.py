"""A terminal shows what a job waits for; a log gets no line of it."""

import io
import os
import pty
import re
import sys
import time

import pytest

from pipelines.cli import waiting as module
from pipelines.cli.waiting import waiting


def test_a_terminal_shows_what_for_and_how_long_and_is_left_clean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SHOWN_AFTER", 0.01)
    monkeypatch.setattr(module, "_EVERY", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    reader, terminal = pty.openpty()
    with open(terminal, "w", closefd=True) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with waiting("loading the model"):
            shown = b""
            while b"s\x1b[K" not in shown:
                shown += os.read(reader, 1024)
            time.sleep(0.05)
        while not shown.endswith(b"\r\x1b[K"):
            shown += os.read(reader, 1024)
    os.close(reader)
    assert re.match(rb"\rloading the model \xe2\x80\xa6 \d+ s\x1b\[K", shown)


def test_a_log_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHOWN_AFTER", 0.0)
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with waiting("loading the model"):
        time.sleep(0.02)
    assert log.getvalue() == ""
