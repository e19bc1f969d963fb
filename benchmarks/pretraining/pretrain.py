"""Pretrain the base models of the tiny world, part by part.

    python -m benchmarks.pretraining.pretrain FOLDER [--seed N] [--stage1 RUN] [--stage2 RUN]

    VAE ─▶ CLIP text encoder, on pairs ─▶ text to image (text encoder and UNet)
    Florence-2's vision tower, on patches ─▶ its language model, on sequences
    language model: independent

Uses only scenes of the training split, and takes about 25 minutes on two idle cores (OMP_NUM_THREADS
sets their number). The parts are evaluated on the validation split, with the float16 weights on disk.
The same command continues at the part that an interrupted one was training. `--stage1` also writes the
weights of a finished stage-1 run on these models into the folder stage1 beside FOLDER, `--stage2` those
of a stage-2 run on that folder into stage2.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    Florence2ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

from benchmarks.pretraining import figures
from benchmarks.pretraining.fitting import Fitted, Pictures
from benchmarks.pretraining.florence import train_florence
from benchmarks.pretraining.language_model import train_language_model
from benchmarks.pretraining.shipping import ship_stage1, ship_stage2
from benchmarks.pretraining.text_encoder import train_text_encoder
from benchmarks.pretraining.text_to_image import train_text_to_image
from benchmarks.pretraining.vae import encode, train_vae
from benchmarks.pretraining.vision import train_vision
from pipelines.storage.files import write_atomically
from pipelines.storage.tables import check_same_settings, check_unused, read_json_object
from vlv_model.checkpoints.loading import quietly
from vlv_model.errors import VLVError
from vlv_model.tiny import ENCODER_IMAGE_SIZE, write_tiny_models

RECORD = "pretraining.json"


@dataclass(frozen=True)
class Recipe:
    """How long each part is trained, and on how many scenes."""

    pictures: int = 16_000
    validation_pictures: int = 256
    vae_steps: int = 3_000
    text_encoder_steps: int = 400
    text_to_image_steps: int = 1_500
    vision_steps: int = 1_200
    florence_steps: int = 2_500
    language_model_steps: int = 400


def pretrain(folder: Path, seed: int = 0, recipe: Recipe = Recipe()) -> dict[str, Any]:
    """Train the missing parts of a folder; returns the record of settings, times and metrics.

    Raises RunError if the folder holds models of other settings, or other files.
    """
    with quietly():
        training = _Pretraining(folder, seed, recipe)
        training.begin()
        training.part("vae", training.vae)
        training.part("text_encoder", training.text_encoder)
        training.part("text_to_image", training.text_to_image)
        training.part("vision", training.vision)
        training.part("florence", training.florence)
        training.part("language_model", training.language_model)
    return training.record


class _Pretraining:
    def __init__(self, folder: Path, seed: int, recipe: Recipe) -> None:
        self.folder, self.seed, self.recipe = folder, seed, recipe
        self.diffusion = self.folder / "diffusion"
        self.pictures = Pictures("train", seed, recipe.pictures)
        self.held_out = Pictures("validation", seed, recipe.validation_pictures)
        self.record = self._claim()

    def _claim(self) -> dict[str, Any]:
        settings = {"seed": self.seed, **asdict(self.recipe)}
        file = self.folder / RECORD
        if file.is_file():
            record = read_json_object(file)
            check_same_settings(self.folder, record["settings"], settings, "FOLDER")
            return record
        check_unused(self.folder, (), "pretraining", "FOLDER")
        versions = {p: version(p) for p in ("torch", "diffusers", "transformers")}
        versions["python"] = platform.python_version()
        return {"settings": settings, "parts": {}, "versions": versions}

    def _save_record(self) -> None:
        write_atomically(self.folder / RECORD, json.dumps(self.record, indent=2) + "\n")

    def begin(self) -> None:
        """Write the untrained models if they are missing."""
        self._save_record()
        if not (self.folder / "model.json").is_file():  # written last
            write_tiny_models(self.folder, self.seed)

    def part(self, name: str, train: Callable[[], tuple[Fitted, dict[str, float]]]) -> None:
        """Train a part unless the record has it, and record its metrics."""
        if name in self.record["parts"]:
            return
        fitted, measured = train()
        rounded = {key: float(f"{value:.4g}") for key, value in measured.items()}
        self.record["parts"][name] = {**asdict(fitted), **rounded}
        self._save_record()
        shown = ", ".join(f"{key} {value}" for key, value in rounded.items())
        print(f"{name}: {shown} ({fitted.seconds:.0f} s)", flush=True)

    # ------------------------------------------------------------------------------- parts

    def vae(self) -> tuple[Fitted, dict[str, float]]:
        vae = AutoencoderKL.from_pretrained(self.diffusion / "vae")
        fitted = train_vae(vae, self.pictures, self.recipe.vae_steps, self.seed)
        _save(vae, self.diffusion / "vae")
        return fitted, figures.of_vae(_load(AutoencoderKL, self.diffusion / "vae"), self.held_out)

    def text_encoder(self) -> tuple[Fitted, dict[str, float]]:
        folder, tokenizer = self.diffusion / "text_encoder", self._clip_tokenizer()
        model = CLIPTextModel.from_pretrained(folder)
        steps, seed = self.recipe.text_encoder_steps, self.seed
        fitted = train_text_encoder(model, tokenizer, self.latents, self.pictures, steps, seed)
        _save(model, folder)
        return fitted, {"loss": fitted.loss}

    def text_to_image(self) -> tuple[Fitted, dict[str, float]]:
        text_encoder = _load(CLIPTextModel, self.diffusion / "text_encoder")
        unet = UNet2DConditionModel.from_pretrained(self.diffusion / "unet")
        scheduler = DDPMScheduler.from_pretrained(self.diffusion / "scheduler")
        fitted = train_text_to_image(
            text_encoder,
            self._clip_tokenizer(),
            unet,
            scheduler,
            self.latents,
            self.pictures,
            self.recipe.text_to_image_steps,
            self.seed,
        )
        _save(text_encoder, self.diffusion / "text_encoder")
        _save(unet, self.diffusion / "unet")
        return fitted, figures.of_text_to_image(self.folder, self.held_out)

    def vision(self) -> tuple[Fitted, dict[str, float]]:
        folder = self.folder / "florence"
        model = Florence2ForConditionalGeneration.from_pretrained(folder).eval()
        steps, seed = self.recipe.vision_steps, self.seed
        fitted = train_vision(model, ENCODER_IMAGE_SIZE, self.pictures, steps, seed)
        _save(model, folder)
        return fitted, {"loss": fitted.loss}

    def florence(self) -> tuple[Fitted, dict[str, float]]:
        folder, tokenizer = self.folder / "florence", self._tokenizer("florence")
        model = _load(Florence2ForConditionalGeneration, folder)
        size, steps, seed = ENCODER_IMAGE_SIZE, self.recipe.florence_steps, self.seed
        fitted = train_florence(model, tokenizer, size, self.pictures, steps, seed)
        _save(model, folder)
        model = _load(Florence2ForConditionalGeneration, folder)
        return fitted, figures.of_florence(model, tokenizer, size, self.held_out)

    def language_model(self) -> tuple[Fitted, dict[str, float]]:
        folder, tokenizer = self.folder / "language_model", self._tokenizer("language_model")
        model = Qwen2ForCausalLM.from_pretrained(folder)
        steps, seed = self.recipe.language_model_steps, self.seed
        fitted = train_language_model(model, tokenizer, self.pictures, steps, seed)
        _save(model, folder)
        model = _load(Qwen2ForCausalLM, folder)
        return fitted, figures.of_language_model(model, tokenizer, self.held_out)

    @cached_property
    def latents(self) -> Tensor:
        """Scaled latents of the training pictures, `[n c 8 8]`."""
        vae = _load(AutoencoderKL, self.diffusion / "vae")
        return encode(vae, self.pictures) * vae.config.scaling_factor

    def _clip_tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.diffusion / "tokenizer")

    def _tokenizer(self, part: str) -> Any:
        kind = AutoTokenizer if part == "florence" else PreTrainedTokenizerFast
        return kind.from_pretrained(self.folder / part)


def _save(model: Any, folder: Path) -> None:
    model.to(memory_format=torch.contiguous_format).half().save_pretrained(folder)
    config = read_json_object(folder / "config.json")
    # A local path of the machine that trained it.
    config.pop("_name_or_path", None)
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _load(kind: Any, folder: Path) -> Any:
    """Load a part in float32 from its float16 file, in eval mode."""
    return kind.from_pretrained(folder).float().eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the models")
    parser.add_argument("--seed", type=int, default=0, help="of weights, drawings and training")
    parser.add_argument("--stage1", type=Path, help="finished stage-1 run on these models")
    parser.add_argument("--stage2", type=Path, help="stage-2 run on the folder stage1")
    given = parser.parse_args()
    folder = given.folder.absolute()
    try:
        pretrain(folder, given.seed)
        if given.stage1:
            ship_stage1(given.stage1, folder, folder.parent / "stage1")
        if given.stage2:
            ship_stage2(given.stage2, folder.parent / "stage1", folder.parent / "stage2")
    except VLVError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"models: {folder}")


if __name__ == "__main__":
    main()
