"""Runs a part in a process of its own, so that a crash, a full memory or a hang ends only that part."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_LAST_CHARACTERS = 1_500  # of a failed part's output


def run_part(name: str, size: str, device: str, limit: float) -> dict[str, Any]:
    """Figures of a part with its `status` (ok, failed, timeout) and `seconds`."""
    with tempfile.TemporaryDirectory(prefix="vlv-gpu-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        command = [sys.executable, "-m", "benchmarks.gpu", "--size", size, "--device", device]
        command += ["--part", name, "--result", str(result)]
        begun = time.monotonic()
        with log.open("wb") as output:
            child = subprocess.Popen(
                command, cwd=_ROOT, stdout=output, stderr=output, start_new_session=True
            )
            try:
                status = child.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill_group(child)
        seconds = round(time.monotonic() - begun, 1)
        if status == 0 and result.is_file():
            return {"status": "ok", "seconds": seconds, **json.loads(result.read_text())}
        about = f"ended with status {status}" if status is not None else f"took over {limit:.0f} s"
        text = log.read_text(errors="replace").strip()[-_LAST_CHARACTERS:]
        outcome = "failed" if status is not None else "timeout"
        return {"status": outcome, "seconds": seconds, "reason": about, "output": text}


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """End the part and what it started; its session has the child's id."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
