"""Captioners and images for benchmarks/recaption/throughput.py.

The tiny captioner is trained on drawn scenes until its captions are right and end. The others are
too large to train here: they have random weights, and each caption ends at a random length that
depends on the image's key, the same in every program.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from benchmarks.faults.jobs import environment
from benchmarks.faults.kinds import REPO
from benchmarks.training.models import PARAGRAPH, SIZES, captioner
from pipelines.execution.model import ModelSettings
from pipelines.images.rows import IMAGE_ROW
from pipelines.recaption.engine import local_engine
from pipelines.recaption.predictor import CaptionImages
from pipelines.tiny_world import scenes
from pipelines.tiny_world.pretrained import FOLDER, STAGE1
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.export import export_model
from vlv_model.checkpoints.sources import resolve_model
from vlv_model.decoding import FinishedSequence, RunningSequence, Sampling, SlotDecoder
from vlv_model.preprocessing import square_image
from vlv_model.tiny import write_tiny_models

_PAIRS = 1_600
_PHOTO = (640, 480)
_TRAINING = {
    "steps": 300,
    "global_batch_size": 64,
    "learning_rate": 2e-3,
    "num_workers": 1,
    "use_gpu": "false",
    "wandb": "disabled",
    "samples": 0,
    "eval_rows": 64,
    "max_caption_tokens": 128,
}


def write_images(file: Path, count: int, size: str, seed: int = 2) -> Path:
    """Write a Parquet file of drawn scenes, unless it exists; photograph-sized except for tiny."""
    if file.exists():
        return file
    rows = []
    for number, scene in enumerate(scenes.sample(seed, count)):
        picture, buffer = scenes.draw(scene, number), io.BytesIO()
        if size == "tiny":
            picture.save(buffer, "PNG")
        else:
            picture.resize(_PHOTO).save(buffer, "JPEG", quality=95)
        image = {"bytes": buffer.getvalue(), "path": None}
        about = {"caption": scenes.caption(scene), "status": "ok"}
        rows.append({"key": number * 7919, "url": f"http://x/{number}", "image": image, **about})
    schema = IMAGE_ROW.append(pa.field("caption", pa.string()))
    part = file.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows, schema), part, row_group_size=64)
    part.rename(file)
    return file


def trained(folder: Path) -> Path:
    """A stage-2 run from the shipped encoder; trains it unless it exists."""
    run = folder / "stage2"
    if not (run / "result.json").exists():
        pairs = write_images(folder / "pairs.parquet", _PAIRS, "tiny", seed=1)
        command = [sys.executable, "jobs/stage2.py", f"data.input={pairs}", f"run_dir={run}"]
        command += [f"model.path={FOLDER / STAGE1}", "ray.num_cpus=2"]
        command += [f"train.{name}={value}" for name, value in _TRAINING.items()]
        subprocess.run(command, cwd=REPO, check=True, env=environment(folder))
    return run


def random(folder: Path, size: str) -> Path:
    """An exported captioner with random weights; writes it unless it exists."""
    model = folder / f"random-{size}"
    if not model.exists():
        about = SIZES[size]
        lengths = ("num_queries", "image_size", "encoder_image_size")
        metadata = {"stage": "stage2", "step": 0, "rows_seen": 0, "config": {}}
        with tempfile.TemporaryDirectory() as parts:
            tiny = resolve_model(write_tiny_models(Path(parts) / "tiny"))[0]
            config = tiny.model_copy(update={name: getattr(about, name) for name in lengths})
            export_model(model, captioner(about, torch.device("cpu")), config, metadata)
    return model


def forced_length(key: int, longest: int) -> int:
    """Tokens of an image's caption with the end-of-text, uniform over the length of teachers' captions."""
    shortest, limit = min(PARAGRAPH[0], longest // 4), min(PARAGRAPH[1], longest)
    return int(np.random.default_rng(abs(key)).integers(shortest, limit + 1))


def spread_length(key: int, longest: int) -> int:
    """Like `forced_length`, but most captions are short: of 300 tokens, 20 and an exponential of 60."""
    drawn = longest / 15 + np.random.default_rng(abs(key)).exponential(longest / 5)
    return max(1, min(longest, round(drawn)))


class ForcedDecoder(SlotDecoder):
    """Ends captions at `length_of` their keys, and counts the slots in use at each step."""

    length_of = staticmethod(forced_length)
    steps = used = 0

    def step(self) -> list[FinishedSequence]:
        self.steps += bool(self._sequences)
        self.used += len(self._sequences)
        return super().step()

    def _choose_tokens(self, logits: Tensor, sequences: Sequence[RunningSequence]) -> list[int]:
        logits[:, self.end_of_text] = -torch.inf
        for row, sequence in enumerate(sequences):
            if len(sequence.ids) + 1 >= self.length_of(sequence.key, self.max_new_tokens):
                logits[row, self.end_of_text] = torch.inf
        return super()._choose_tokens(logits, sequences)


class ForcedCaptioner(VLVCaptioner):
    """A captioner whose captions end at `forced_length`."""

    def decoder(
        self, slots: int, max_new_tokens: int, sampling: Sampling | None = None
    ) -> SlotDecoder:
        plain = super().decoder(slots, max_new_tokens, sampling)
        plain.__class__ = ForcedDecoder
        return plain


def is_forced(model: Path) -> bool:
    """Whether this captioner has random weights and needs forced lengths."""
    return model.name.startswith("random-")


def open_captioner(model: Path) -> VLVCaptioner:
    """The captioner of a folder, float32, on the CPU."""
    captioner = VLVCaptioner.from_pretrained(*ModelSettings(path=str(model)).resolve())
    if is_forced(model):
        captioner.__class__ = ForcedCaptioner
    return captioner


class ForcedCaptionImages(CaptionImages):
    """The job's actor with a `ForcedCaptioner`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        captioner = self.engine.captioner
        captioner.__class__ = ForcedCaptioner
        self.engine = local_engine(captioner, self.engine.generate)


def squares_of(file: Path, keys: Collection[int], captioner: VLVCaptioner) -> dict[int, Tensor]:
    """Decoded squares of some images, by key, uint8 `[3 s s]`."""
    side = captioner.encoder.encoder_image_size // 2
    found = {}
    for rows in pq.ParquetFile(file).iter_batches(64, columns=["key", "image"]):
        for row in rows.to_pylist():
            if row["key"] in keys:
                with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                    found[row["key"]] = square_image(image, side)
    return found
