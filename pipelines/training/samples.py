"""Samples of checkpoints: a few images reconstructed or captioned in a Ray task during training.

<run_dir>/samples/step-00001000.html   originals with reconstructions (stage 1) or captions (stage 2)
                               .parquet   the same for the run's report (see sample_files)

Training does not wait for the task, which starts when a CPU and enough memory are free. One task runs
at a time; of the checkpoints that wait for it, only the newest gets samples. The last checkpoint of a
run always does, on a GPU if the training used GPUs. A failure prints one line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.execution.model import CHECKPOINTS, checkpoint_name, is_finished
from pipelines.images.external import UndecodableImage
from pipelines.images.random_access import Decode, RowIndex, RowReader
from pipelines.images.rows import OK
from pipelines.reconstruct.config import DiffusionConfig
from pipelines.report.gallery import GalleryItem
from pipelines.report.html import page
from pipelines.storage.files import write_atomically
from pipelines.training.caption_index import CaptionIndex
from pipelines.training.sample_files import FOLDER, write_samples
from vlv_model.config import ModelConfig
from vlv_model.squares import Square

if TYPE_CHECKING:
    import torch

# Good enough to judge by, and takes minutes on one CPU.
DIFFUSION = DiffusionConfig(num_steps=20, seed=0)
LAST_SECONDS = 900.0  # time limit of the last samples, after training

# Memory to reserve: float32 weights with room for activations, and the libraries.
_BYTES_PER_PARAMETER, _LIBRARY_BYTES = 5, 2 << 30

Show = Callable[[int, list[GalleryItem]], None]


@dataclass(frozen=True)
class Samples:
    """The inputs of the task that makes a checkpoint's samples."""

    run_dir: Path
    model: ModelConfig
    rows: RowIndex
    captions: bool  # stage 2; else reconstructions
    targets: Path | None = None  # index of target captions, shown with the generated ones
    max_tokens: int = 0  # of a caption
    decoding: Decode | None = None  # of the images' bytes; default: in this process

    def page(self, step: int) -> Path:
        return self.run_dir / FOLDER / f"{checkpoint_name(step)}.html"

    def make(self, step: int, use_gpu: bool) -> list[GalleryItem]:
        """Make the samples of the checkpoint of `step` and write its page; none if it was deleted."""
        import torch

        from pipelines.reconstruct.predictor import png

        checkpoint = self.run_dir / CHECKPOINTS / checkpoint_name(step)
        if not is_finished(checkpoint):
            return []
        keys, arrays = self._read()
        if not keys:
            return []
        targets = (
            CaptionIndex.open(self.targets).first(keys) if self.targets else [None] * len(keys)
        )
        squares = torch.from_numpy(np.stack(arrays)).to("cuda" if use_gpu else "cpu")
        outputs = (
            self._captions(checkpoint, squares)
            if self.captions
            else self._pictures(checkpoint, squares, keys)
        )
        items = [
            GalleryItem(
                key=int(key),
                original=png(square.cpu()),
                status=OK,
                target=target,
                **output,
            )
            for key, target, square, output in zip(keys, targets, squares, outputs, strict=True)
        ]
        subtitle = f"Images that are not trained on, after {step:,} steps of {self.run_dir.name}"
        file = self.page(step)
        file.parent.mkdir(exist_ok=True)
        shown = page("training/samples.html.jinja", "Samples", subtitle, items=items,
                     captions=self.captions)  # fmt: skip
        write_samples(self.run_dir, step, items)
        write_atomically(file, shown)
        return items

    def _read(self) -> tuple[list[int], list[np.ndarray]]:
        """Keys and squares of the images; prints a line for each that cannot be decoded."""
        geometry = Square.of(self.model)
        reader = RowReader(self.rows, decode=self.decoding)
        keys, squares = [], []
        for position, key in enumerate(self.rows.keys.tolist()):
            try:
                squares.append(reader.square(position, geometry))
            except UndecodableImage as error:
                print(f"no sample: {error}", file=sys.stderr)
                continue
            keys.append(key)
        return keys, squares

    def _pictures(
        self, checkpoint: Path, squares: torch.Tensor, keys: list[int]
    ) -> list[dict[str, Any]]:
        from pipelines.reconstruct.predictor import png, sample_batches
        from vlv_model.autoencoder import VLVAutoEncoder

        # Written by this run just now, so not verified.
        autoencoder = VLVAutoEncoder.from_pretrained(self.model, checkpoint, verify=False)
        autoencoder.to(squares.device)

        def sample(rows: slice, **sampling: Any) -> torch.Tensor:
            return autoencoder.reconstruct(squares[rows], **sampling)

        # The same noise at each checkpoint, so that only the weights differ.
        preview = autoencoder.diffusion_decoder.preview_sampler
        diffusion = DIFFUSION.model_copy(update={"sampler": preview})
        pictures = sample_batches(diffusion, keys, sample)
        return [{"reconstruction": png(picture), "caption": None} for picture in pictures]

    def _captions(self, checkpoint: Path, squares: torch.Tensor) -> list[dict[str, Any]]:
        from vlv_model.captioner import VLVCaptioner

        captioner = VLVCaptioner.from_pretrained(self.model, checkpoint, verify=False)
        captioner.to(squares.device)
        captions = captioner.generate(squares, max_new_tokens=self.max_tokens)
        return [{"reconstruction": None, "caption": caption.text} for caption in captions]


class Sampler:
    """Starts the tasks on the driver, one per checkpoint after an evaluation, and shows the samples."""

    def __init__(
        self, samples: Samples, steps: int, use_gpu: bool, resources: Mapping[str, float]
    ) -> None:
        """`resources` are what the last task reserves besides its GPU."""
        self.samples, self.steps, self.use_gpu = samples, steps, use_gpu
        self.resources = dict(resources)
        self.parameters = 0  # of the model, from the start event
        self._after_eval = False  # the next checkpoint gets samples
        self._next_step: int | None = None  # checkpoint that waits for a task
        self._task: Any = None
        self._step = 0  # of the running task

    def handle(self, event: Mapping[str, Any]) -> None:
        """Handle an event of the training."""
        if event["event"] == "start":
            self._cancel()  # frees resources for starting or restarting workers
            self.parameters = event["parameters"]
        elif event["event"] == "eval":
            self._after_eval = True
        elif event["event"] == "checkpoint" and self._after_eval:
            self._after_eval, self._next_step = False, event["step"]

    def poll(self, show: Show) -> None:
        """Show finished samples and start the next task if a CPU is free; does not block."""
        from ray._private.state import (
            available_resources_per_node,
        )  # no public function is per node

        self._collect(show)
        if self._task is not None or self._next_step in (None, self.steps):
            return
        # A pending task would scale up the cluster, or take the place of a lost worker.
        memory = self._memory("CPU")
        if any(
            free.get("CPU", 0) >= 1 and free.get("memory", 0) >= memory
            for free in available_resources_per_node().values()
        ):
            self._start(self._next_step, {"num_cpus": 1, "memory": memory})

    def finish(self, show: Show) -> None:
        """After training: cancel a running task, make the last samples and wait for them."""
        if self.samples.page(self.steps).is_file():
            self._cancel()
            return
        limit = time.monotonic() + LAST_SECONDS
        self._cancel()
        device = "GPU" if self.use_gpu else "CPU"
        options: dict[str, Any] = {"num_cpus": 1, "memory": self._memory(device)}
        if self.use_gpu:
            options |= {"num_gpus": 1, "resources": self.resources}
        self._start(self.steps, options)
        while self._task is not None:
            self._collect(show)
            if time.monotonic() > limit:
                self._warn(f"not finished {LAST_SECONDS:g} s after the end of training")
                self._cancel()
            time.sleep(0.1)

    def _start(self, step: int, options: dict[str, Any]) -> None:
        import ray

        self._step, self._next_step = step, None
        task = ray.remote(max_retries=0, **options)(_make)
        self._task = task.remote(self.samples, step, bool(options.get("num_gpus")))

    def _memory(self, device: str) -> int:
        """Bytes to reserve, at most what the largest machine with the device has."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        machines = [node.get("memory", 0) for node in nodes if node.get(device)]
        needed = self.parameters * _BYTES_PER_PARAMETER + _LIBRARY_BYTES
        return int(min(needed, max(machines, default=needed)))

    def _collect(self, show: Show) -> None:
        import ray

        if self._task is None or not ray.wait([self._task], timeout=0)[0]:
            return
        task, self._task = self._task, None
        try:
            if items := ray.get(task):
                show(self._step, items)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._warn(lines[-1])

    def _cancel(self) -> None:
        import ray

        if self._task is not None:
            ray.cancel(self._task, force=True)
            self._task = None

    def _warn(self, reason: str) -> None:
        print(f"no samples of step {self._step:,}: {reason}", file=sys.stderr)


def _make(samples: Samples, step: int, use_gpu: bool) -> list[GalleryItem]:
    return samples.make(step, use_gpu)
