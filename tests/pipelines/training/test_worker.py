"""Which errors of a training worker are permanent, and which are retried."""

import queue
from typing import Any

import pytest
import torch

from pipelines.training.worker import run_unless_failed
from vlv_model.errors import DataError, RunError, VLVError

SWITCHES = {"activation_checkpointing": True, "offload_optimizer": False}


def loop() -> dict[str, Any]:
    return {
        "fatal_errors": queue.SimpleQueue(),
        "config": {"train": {"micro_batch_size": 16} | SWITCHES},
    }


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (DataError("row 7 is damaged: mend it"), DataError, "row 7 is damaged: mend it"),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has 24 GiB"
            ),
            RunError,
            "GPU out of memory (CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 24 GiB): "
            "set train.offload_optimizer=true (also to continue this run), or start a new run with "
            "train.micro_batch_size below 16, or use larger GPUs",
        ),
    ],
)
def test_a_permanent_error_is_raised_again_without_retrying(
    error: Exception, kind: type[VLVError], line: str
) -> None:
    ours, attempts = loop(), []

    def work(_: dict[str, Any]) -> None:
        attempts.append(1)
        raise error

    for _ in range(3):  # Ray Train's attempts, on whatever worker
        with pytest.raises(kind) as refused:
            run_unless_failed(ours, work)
        assert str(refused.value) == line
    assert len(attempts) == 1


def test_a_transient_error_is_retried() -> None:
    ours = loop()

    def lost(_: dict[str, Any]) -> None:
        raise ConnectionError("a rank is gone")

    with pytest.raises(ConnectionError):
        run_unless_failed(ours, lost)
    done = []
    run_unless_failed(ours, done.append)
    assert done == [ours]
