"""Which errors of a training worker are permanent, and which are retried."""

import queue

import pytest
import torch

from pipelines.training.config import TrainConfig
from pipelines.training.worker import run_unless_failed
from vlv_model.errors import DataError, RunError, VLVError

TRAIN = TrainConfig(micro_batch_size=16, activation_checkpointing=True)


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
    errors: queue.SimpleQueue[VLVError] = queue.SimpleQueue()
    attempts = []

    def work() -> None:
        attempts.append(1)
        raise error

    for _ in range(3):  # Ray Train's attempts, on whatever worker
        with pytest.raises(kind) as refused:
            run_unless_failed(TRAIN, errors, work)
        assert str(refused.value) == line
    assert len(attempts) == 1


def test_a_transient_error_is_retried() -> None:
    errors: queue.SimpleQueue[VLVError] = queue.SimpleQueue()

    def lost() -> None:
        raise ConnectionError("a rank is gone")

    with pytest.raises(ConnectionError):
        run_unless_failed(TRAIN, errors, lost)
    done = []
    run_unless_failed(TRAIN, errors, lambda: done.append(1))
    assert done == [1]
