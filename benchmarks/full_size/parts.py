"""The parts of the full-size run: which jobs each runs, with which settings, and what they write.

Each part can run alone: trainings start from the base models, and what needs a trained model gets a
checkpoint that benchmarks/full_size/folders.py writes.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.full_size import folders

STEPS = 2
_RAY = ("ray.num_cpus=2", "ray.object_store_gb=0.3")
_TRAIN = {
    "global_batch_size": 1,
    "num_workers": 1,
    "use_gpu": "false",
    "precision": "bfloat16",
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "eval_rows": 1,
    "samples": 0,
    "wandb": "disabled",
}
_ACTORS = ("actors.use_gpu=false", "actors.num_actors=1")
_CAPTIONS = ("generate.max_new_tokens=16", "generate.batch_size=1")


@dataclass(frozen=True)
class Work:
    """Folder of the run, and the inputs in it."""

    folder: Path
    size: str
    images_count: int = folders.IMAGES

    @property
    def models(self) -> Path:
        """Base models."""
        return self.folder / "models"

    @property
    def images(self) -> Path:
        """An image table with captions."""
        return self.folder / "images"

    @property
    def encoder(self) -> Path:
        """A stage-1 checkpoint."""
        return self.folder / "encoder"

    @property
    def captioner(self) -> Path:
        """A stage-2 checkpoint on top of `encoder`."""
        return self.folder / "captioner"

    def output(self, part: str) -> Path:
        return self.folder / "output" / part

    def write(self, model: Path) -> None:
        """Write the images and `model`, one of the above, with all that it builds on, unless they exist.

        In a process of its own, since Python would keep the models' memory. Raises RuntimeError when
        that process fails.
        """
        process = multiprocessing.get_context("spawn").Process(target=self._write, args=(model,))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"writing '{model}' ended with status {process.exitcode}")

    def _write(self, model: Path) -> None:
        folders.write_images(self.images / "images.parquet", self.images_count)
        folders.write_models(self.models, self.size)
        if model in (self.encoder, self.captioner):
            folders.write_checkpoint(self.encoder, "stage1", self.models)
        if model == self.captioner:
            folders.write_checkpoint(self.captioner, "stage2", self.models, self.encoder)


@dataclass(frozen=True)
class Job:
    """A job that opens `model`. One that is `killed` is killed once and continued."""

    script: str
    model: Path
    output: Path
    more: tuple[str, ...]
    killed: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        return f"model.path={self.model}", *self.more

    @property
    def command(self) -> list[str]:
        return [sys.executable, f"jobs/{self.script}.py", *self.settings]


def stage1(work: Work, part: str) -> list[Job]:
    """With the VAE in every step."""
    return [_training(work, part, "stage1", STEPS, killed=True)]


def stage1_latents(work: Work, part: str) -> list[Job]:
    """On latents that jobs/precompute.py stores first."""
    latents = work.output(f"{part}-latents")
    settings = (f"data.input={work.images}", f"data.output={latents}", "encode.batch_size=1")
    # Of all images, since the training needs them.
    encode = Job("precompute", work.models, latents, (*settings, *_ACTORS, *_RAY))
    more = (f"data.latents={latents}",)
    return [encode, _training(work, part, "stage1", STEPS, *more, killed=True)]


def stage2(*more: str) -> Callable[[Work, str], list[Job]]:
    """One step with these settings."""
    return lambda work, part: [_training(work, part, "stage2", 1, *more)]


def recaption(*more: str) -> Callable[[Work, str], list[Job]]:
    """One image, 16 tokens."""
    return lambda work, part: [
        _image_job(work, part, "recaption", work.captioner, *_CAPTIONS, *more)
    ]


def reconstruct(work: Work, part: str) -> list[Job]:
    """One picture in two denoising steps."""
    more = ("diffusion.num_steps=2", "diffusion.batch_size=1")
    return [_image_job(work, part, "reconstruct", work.encoder, *more)]


def export(work: Work, part: str) -> list[Job]:
    """The captioner with its base models, float32."""
    output = work.output(part)
    return [Job("export", work.captioner, output, (f"output={output}",))]


PARTS: dict[str, Callable[[Work, str], list[Job]]] = {
    "stage1": stage1,
    "stage1-latents": stage1_latents,
    "stage2-projector": stage2("train.trainable=projector"),
    "stage2-llm": stage2("train.trainable=projector+llm"),
    "stage2-encoder": stage2("train.trainable=projector+llm+encoder"),
    "stage2-lora": stage2("train.lora.rank=16"),
    "recaption": recaption("generate.num_beams=1", "generate.precision=bfloat16"),
    "recaption-beams": recaption("generate.num_beams=4", "generate.precision=float32"),
    "reconstruct": reconstruct,
    "export": export,
}


def _training(
    work: Work, part: str, stage: str, steps: int, *more: str, killed: bool = False
) -> Job:
    output = work.output(part)
    settings = [f"data.input={work.images}", f"run_dir={output}", "data.holdout=0.3"]
    settings += [f"train.steps={steps}", *(f"train.{k}={v}" for k, v in _TRAIN.items()), *_RAY]
    model = work.models if stage == "stage1" else work.encoder
    return Job(stage, model, output, (*settings, *more), killed)


def _image_job(work: Work, part: str, script: str, model: Path, *more: str) -> Job:
    output = work.output(part)
    settings = (f"data.input={work.images}", f"data.output={output}", "data.limit=1")
    return Job(script, model, output, (*settings, *_ACTORS, *_RAY, *more))
