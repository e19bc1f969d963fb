"""Memory of one worker's GPU by what it holds, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Bytes of CUDA's context, kernels, workspaces of cuBLAS and cuDNN, and NCCL's buffers. From figures
# that users of DeepSpeed report; not measured.
CONTEXT = 1_500_000_000
PROCESS = 1_000_000_000  # bytes of the machine's memory of a process with the libraries
HOST_PROCESS = 3_000_000_000  # the same beside a GPU, with CUDA's libraries; not measured
FRAGMENTATION = 1.10  # the allocator's memory / the activations' memory; not measured

_COUNTS = 3  # each takes up to a minute at full size


def on_gpu(use_gpu: bool | None) -> bool:
    """Whether an estimate is of a GPU: also while `use_gpu` is undecided."""
    return use_gpu is not False


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker's device. A GPU holds weights, gradients and optimiser throughout a step."""

    weights: int
    gradients: int = 0  # what stays of them until the update
    optimizer: int = 0  # master weights and moments
    buckets: int = 0  # gradients on their way to other workers, once the first is complete
    activations: int = 0  # peak of a step, with inputs; of captioning with the cache
    late_activations: int = 0  # their peak once there are buckets
    update: int = 0  # during the update: copies of gradients
    context: int = 0  # outside torch's allocator

    @property
    def states(self) -> int:
        """What is there throughout a step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def allocated(self) -> int:
        """The peak of torch's allocator."""
        return self.states + max(
            self.activations, self.buckets + self.late_activations, self.update
        )

    @property
    def total(self) -> int:
        """The peak of the device's memory, fragments and context included."""
        early, late = (round(FRAGMENTATION * n) for n in (self.activations, self.late_activations))
        return self.states + max(early, self.buckets + late, self.update) + self.context

    @property
    def least(self) -> int:
        """What a training needs with activations of nothing: known without counting."""
        return self.states + max(self.buckets, self.update) + self.context


def largest_batch(rows: int, memory: Memory, count: Callable[[int], Memory], capacity: int) -> int:
    """The most rows that fit `capacity` bytes; 0 if not even one does.

    `memory` is that of `rows` rows. A larger batch is guessed from the line through two counts, and
    counted before it is returned.
    """
    if memory.least > capacity:
        return 0
    totals = {0: memory.least, rows: memory.total}
    last = rows
    for _ in range(_COUNTS):
        other = max(n for n in totals if n != last)
        slope = max(1.0, (totals[last] - totals[other]) / (last - other))
        guess = max(0, int(last + (capacity - totals[last]) / slope))
        if guess in totals:
            break
        totals[guess], last = count(guess).total, guess
    return max(n for n, total in totals.items() if total <= capacity)
