"""What a worker of a training refuses, and what is tried again."""

import queue
from typing import Any

import pytest
import torch

from pipelines.training.job import train_or_refuse
from vlv_model.errors import DataError, RunError, VLVError

SWITCHES = {"activation_checkpointing": True, "offload_optimizer": False}


def loop() -> dict[str, Any]:
    return {
        "refusals": queue.SimpleQueue(),
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
            "a GPU's memory is full (CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 24 GiB): "
            "set train.offload_optimizer=true (also in a run that has begun), or begin a run with "
            "train.micro_batch_size below 16, or take larger GPUs",
        ),
    ],
)
def test_what_another_attempt_would_meet_again_is_said_and_not_tried(
    error: Exception, kind: type[VLVError], line: str
) -> None:
    ours, attempts = loop(), []

    def work(_: dict[str, Any]) -> None:
        attempts.append(1)
        raise error

    for _ in range(3):  # Ray Train's attempts, on whatever worker
        with pytest.raises(kind) as refused:
            train_or_refuse(ours, work)
        assert str(refused.value) == line
    assert len(attempts) == 1


def test_what_another_attempt_may_mend_is_tried_again() -> None:
    ours = loop()

    def lost(_: dict[str, Any]) -> None:
        raise ConnectionError("a rank is gone")

    with pytest.raises(ConnectionError):
        train_or_refuse(ours, lost)
    done = []
    train_or_refuse(ours, done.append)
    assert done == [ours]
