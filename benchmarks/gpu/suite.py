"""The tests that need a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.setting import Setting

_ROOT = Path(__file__).parents[2]


def gpu_tests(setting: Setting) -> dict[str, Any]:
    """As `make gpu`; the number of tests by outcome. Raises RuntimeError with the output if some fail."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError((ended.stdout + ended.stderr)[-2_000:])
    counts = re.findall(r"(\d+) (\w+)", ended.stdout.strip().splitlines()[-1])
    return {outcome: int(number) for number, outcome in counts if outcome != "in"}
