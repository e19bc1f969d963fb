"""What DeepSpeed is asked for, and does."""

import json
import os
import socket
import subprocess
from pathlib import Path

from tests.pipelines.training.sums import SUM


def test_bfloat16_gradients_are_accumulated_in_float32(forked_python: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    command = [forked_python, "-m", "tests.pipelines.training.sums", "1", "2", "2-offload", "3"]
    ended = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=300
    )
    found = json.loads(ended.stdout.splitlines()[-1])
    # Stage 1 keeps the sums of bfloat16: DeepSpeed has no other for it that we can save.
    assert found == {"1": 2.0, "2": SUM, "2-offload": SUM, "3": SUM}, ended.stderr
