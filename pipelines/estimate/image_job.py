"""The dry run of a job whose actors hold a model: what is the same in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.estimate.config import EstimateConfig
from pipelines.estimate.machines import Gpu
from pipelines.estimate.memory import CONTEXT, Memory, on_gpu
from pipelines.estimate.report import (
    assumption_lines,
    card_lines,
    disk_line,
    hours_lines,
    memory_lines,
    parameter_lines,
)
from pipelines.estimate.rows import selected_rows
from pipelines.estimate.sample import sample_lines
from pipelines.estimate.words import lines
from pipelines.execution.connection import bounds
from pipelines.execution.image_job import ActorConfig
from pipelines.images.selection import Selection


def actor_memory(actors: ActorConfig, weights: int, activations: int) -> Memory:
    """Memory of an actor, which trains nothing."""
    context = CONTEXT * on_gpu(actors.use_gpu)
    return Memory(weights, activations=activations, context=context)


@dataclass(frozen=True)
class ImageJobEstimate:
    """What one job fills in."""

    parameters: int
    precision: str
    setting: str  # name of the batch size
    batch: int  # its value
    memory: Callable[[int], Memory]  # of an actor with a batch
    bytes_each: float  # that an image takes on disk
    stored: str  # what the disk holds
    per_second: Callable[[Gpu], float]  # images, of one GPU
    batch_words: str = ""  # beside the number of images
    notes: Sequence[tuple[str, str]] = ()
    tokens_each: float = 0.0  # of a caption, if the job writes captions

    def report(self, data: Selection, actors: ActorConfig, estimate: EstimateConfig) -> str:
        """The estimate as text."""
        use_gpu = on_gpu(actors.use_gpu)
        memory = self.memory(self.batch)
        rows, origin = selected_rows(data, estimate.rows)
        what = f"{self.precision}, {self.batch} images{self.batch_words}"
        found = parameter_lines(0, self.parameters)
        found += memory_lines(memory, what, use_gpu)
        if use_gpu:
            found += card_lines(memory, estimate, self.setting, self.batch, self.memory)
        found += self.notes
        found.append(("rows", f"{rows:,} ({origin})" if rows is not None else origin))
        found += sample_lines(data)
        if rows is not None:
            found.append(disk_line(rows * self.bytes_each, self.stored))
        machine = estimate.found_machine()
        if machine is None:
            found.append(("time", "give --machine for hours and dollars"))
        elif use_gpu:
            asked = actors.num_actors
            most = machine.gpus if asked is None else bounds(asked)[1]
            rate = self.per_second(machine.gpu)
            if self.tokens_each:
                tokens = f"{rate * self.tokens_each:,.0f} tokens/s on one GPU"
                found.append(("tokens", tokens))
            found += hours_lines(rows, rate, most, machine, estimate)
            found += assumption_lines(estimate, decodes=bool(self.tokens_each))
        return lines(found)
