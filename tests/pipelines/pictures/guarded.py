"""Programs under a C library that checks its memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

_CHECKER = "libc_malloc_debug.so.0"


def run_guarded(
    program: str, lines: list[str], filling: int = 0x55
) -> subprocess.CompletedProcess[str]:
    """A Python program, which reads the lines, and is aborted where it frees a block beyond whose end
    somebody wrote. Blocks that nobody wrote to are full of `filling`, or of its inverse.
    """
    try:
        ctypes.CDLL(_CHECKER)
    except OSError:
        pytest.skip(f"there is no {_CHECKER} here, which comes with glibc")
    checked = {"LD_PRELOAD": _CHECKER, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": str(filling)}
    return subprocess.run(
        [sys.executable, "-c", program],
        # Python's own allocator would take blocks apart where the C library does not see it.
        env=os.environ | checked | {"PYTHONMALLOC": "malloc"},
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
