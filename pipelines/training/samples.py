"""What checkpoints make of a few images, held-out or named, in a Ray task beside the training.

<run_dir>/samples/step-00001000.html   originals with reconstructions (stage 1) or captions (stage 2)

No worker waits for it: it is begun where a CPU and the memory of a model are free. A checkpoint that comes meanwhile takes its
turn after it, or is passed over for a newer one; the last of a run always has its samples, on a GPU
where the training had some, which are free by then. Samples that fail cost a line and nothing else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.execution import checkpoints
from pipelines.images.external import UndecodableImage
from pipelines.images.random_access import RowIndex, RowReader
from pipelines.images.rows import OK
from pipelines.reconstruct.config import DiffusionConfig
from pipelines.report.gallery import GalleryItem, gallery
from pipelines.report.html import page
from pipelines.storage.files import write_atomically
from vlv_model.config import ModelConfig
from vlv_model.squares import Square

if TYPE_CHECKING:
    import torch

FOLDER = "samples"
# Enough to see what is there, on one CPU in minutes.
DIFFUSION = DiffusionConfig(num_steps=20, sampler="ddim", seed=0)
LAST_SECONDS = 900.0  # that a run may take for its last samples when all else is done

# Of memory that is reserved: float32, with room for what it computes; and what libraries take.
_BYTES_PER_PARAMETER, _BYTES_BESIDE = 5, 2 << 30

Show = Callable[[int, list[GalleryItem]], None]


@dataclass(frozen=True)
class Samples:
    """Which samples a run makes: all that the task has to know."""

    run_dir: Path
    model: ModelConfig
    rows: RowIndex
    captions: bool  # stage 2's; else pictures
    caption_column: str | None = None  # of rows that have a caption, which is shown beside
    max_tokens: int = 0  # of a caption
    isolated: bool = False  # rows of which nobody has decoded the images yet

    def page(self, step: int) -> Path:
        return self.run_dir / FOLDER / f"{checkpoints.checkpoint_name(step)}.html"

    def make(self, step: int, use_gpu: bool) -> list[GalleryItem]:
        """Of the checkpoint of `step`, whose page is written too; none if it is gone already."""
        import torch

        from pipelines.reconstruct.predictor import png

        checkpoint = self.run_dir / checkpoints.FOLDER / checkpoints.checkpoint_name(step)
        if not checkpoints.is_finished(checkpoint):
            return []
        keys, rows, read = self._read()
        if not rows:
            return []
        squares = torch.from_numpy(np.stack(read)).to("cuda" if use_gpu else "cpu")
        made = (
            self._captions(checkpoint, squares)
            if self.captions
            else self._pictures(checkpoint, squares, keys)
        )
        items = [
            GalleryItem(
                key=int(key),
                original=png(square.cpu()),
                status=OK,
                target=row[self.caption_column] if self.caption_column else None,
                **found,
            )
            for key, row, square, found in zip(keys, rows, squares, made, strict=True)
        ]
        shown = gallery(items, len(items), pictures=not self.captions, words=self.captions)
        subtitle = f"Images that are not trained on, after {step:,} steps of {self.run_dir.name}"
        file = self.page(step)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, page("Samples", subtitle, [shown]))
        return items

    def _read(self) -> tuple[list[int], list[dict[str, Any]], list[np.ndarray]]:
        """Keys, rows and squares of the images that are some; of others a line."""
        from pipelines.pictures.squares import isolated_squares

        cut = Square.of(self.model)
        columns = [self.caption_column] if self.caption_column else []
        reader = RowReader(
            self.rows, columns, decode=isolated_squares(cut) if self.isolated else None
        )
        keys, rows, squares = [], [], []
        for position, key in enumerate(self.rows.keys.tolist()):
            try:
                row = reader.row(position)
                squares.append(reader.square(position, cut, row["image"]))
            except UndecodableImage as error:
                print(f"no sample: {error}", file=sys.stderr)
                continue
            keys.append(key)
            rows.append(row)
        return keys, rows, squares

    def _pictures(
        self, checkpoint: Path, squares: torch.Tensor, keys: list[int]
    ) -> list[dict[str, Any]]:
        from pipelines.reconstruct.predictor import png, sampled
        from vlv_model.autoencoder import VLVAutoEncoder

        # This run's own checkpoint, written a moment ago: not read once more for its digest.
        autoencoder = VLVAutoEncoder.from_pretrained(self.model, checkpoint, verify=False)
        autoencoder.to(squares.device)

        def draw(rows: slice, **sampling: Any) -> torch.Tensor:
            return autoencoder.reconstruct(squares[rows], **sampling)

        # From the same noise at each checkpoint, so that what changes is what was learned.
        pictures = sampled(DIFFUSION, keys, draw)
        return [{"reconstruction": png(picture), "caption": None} for picture in pictures]

    def _captions(self, checkpoint: Path, squares: torch.Tensor) -> list[dict[str, Any]]:
        from vlv_model.captioner import VLVCaptioner

        captioner = VLVCaptioner.from_pretrained(self.model, checkpoint, verify=False)
        captioner.to(squares.device)
        captions = captioner.generate(squares, max_new_tokens=self.max_tokens)
        return [{"reconstruction": None, "caption": caption.text} for caption in captions]


class Sampler:
    """The driver's side: starts a task where a checkpoint calls for one, and shows what it made."""

    def __init__(
        self, samples: Samples, steps: int, use_gpu: bool, resources: Mapping[str, float]
    ) -> None:
        """`resources` beside the GPU are what the last task asks for, where it takes one."""
        self.samples, self.steps, self.use_gpu = samples, steps, use_gpu
        self.resources = dict(resources)
        self.parameters = 0  # of the model, as the workers tell
        self._due = False  # an evaluation was, and no checkpoint since
        self._wanted: int | None = None  # step of the checkpoint whose turn is next
        self._task: Any = None
        self._step = 0  # of the task

    def take(self, event: Mapping[str, Any]) -> None:
        """An event of the training."""
        if event["event"] == "start":
            self._drop()  # workers come, again perhaps: they need the room
            self.parameters = event["parameters"]
        elif event["event"] == "eval":
            self._due = True
        elif event["event"] == "checkpoint" and self._due:
            self._due, self._wanted = False, event["step"]

    def poll(self, show: Show) -> None:
        """Show what is ready, and start what waits where a CPU is free; returns at once."""
        from ray._private.state import available_resources_per_node  # of one machine: nowhere else

        self._collect(show)
        if self._task is not None or self._wanted in (None, self.steps):
            return
        # A task that waited would have a machine started for it, or take the place of a lost worker.
        memory = self._memory("CPU")
        if any(
            free.get("CPU", 0) >= 1 and free.get("memory", 0) >= memory
            for free in available_resources_per_node().values()
        ):
            self._start(self._wanted, {"num_cpus": 1, "memory": memory})

    def end(self, show: Show) -> None:
        """Behind the training: make the last samples, and wait for them and for no others."""
        if self.samples.page(self.steps).is_file():
            self._drop()
            return
        limit = time.monotonic() + LAST_SECONDS
        self._drop()
        device = "GPU" if self.use_gpu else "CPU"
        options: dict[str, Any] = {"num_cpus": 1, "memory": self._memory(device)}
        if self.use_gpu:
            options |= {"num_gpus": 1, "resources": self.resources}
        self._start(self.steps, options)
        while self._task is not None:
            self._collect(show)
            if time.monotonic() > limit:
                self._say(f"not ready {LAST_SECONDS:g} s after the training's end")
                self._drop()
            time.sleep(0.1)

    def _start(self, step: int, options: dict[str, Any]) -> None:
        import ray

        self._step, self._wanted = step, None
        task = ray.remote(max_retries=0, **options)(_make)
        self._task = task.remote(self.samples, step, bool(options.get("num_gpus")))

    def _memory(self, device: str) -> int:
        """Bytes to reserve; no more than a machine with the device has, or a task would wait for ever."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        machines = [node.get("memory", 0) for node in nodes if node.get(device)]
        needed = self.parameters * _BYTES_PER_PARAMETER + _BYTES_BESIDE
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
            self._say(lines[-1])

    def _drop(self) -> None:
        import ray

        if self._task is not None:
            ray.cancel(self._task, force=True)
            self._task = None

    def _say(self, why: str) -> None:
        print(f"no samples of step {self._step:,}: {why}", file=sys.stderr)


def _make(samples: Samples, step: int, use_gpu: bool) -> list[GalleryItem]:
    return samples.make(step, use_gpu)
