"""The pretraining script for a few steps, and the rules of its data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.pretraining.fitting import Pictures
from benchmarks.pretraining.florence import PROMPTS, annotation
from benchmarks.pretraining.language_model import partial_text
from benchmarks.pretraining.pretrain import Recipe, pretrain
from benchmarks.pretraining.shipping import ship_stage1
from benchmarks.pretraining.vision import KINDS, patch_labels
from pipelines.tiny_world import scenes
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.checkpoints.sources import resolve_model
from vlv_model.checkpoints.weights import CheckpointMetadata, read_checkpoint, save_checkpoint
from vlv_model.errors import CheckpointError, RunError
from vlv_model.tiny import write_tiny_models

PARTS = ["vae", "text_encoder", "text_to_image", "vision", "florence", "language_model"]
STEPS = {f"{part}_steps": 2 for part in PARTS}


RECIPE = Recipe(pictures=64, validation_pictures=32, **STEPS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pretraining") / "models"
    pretrain(output, recipe=RECIPE)
    return output


def test_models_are_written_in_float16_and_load(models: Path) -> None:
    files = list(models.rglob("*.safetensors"))
    assert len(files) == 5  # florence, VAE, text encoder, UNet, language model
    for file in files:
        kinds = {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()}
        assert kinds == {torch.float16}, file
    for file in models.rglob("*.json"):  # the models are shipped
        assert str(models) not in file.read_text(), file
    autoencoder = VLVAutoEncoder.from_pretrained(models)
    assert all(p.dtype == torch.float32 for p in autoencoder.parameters())


def test_the_record_has_the_metrics_of_each_part(models: Path) -> None:
    record = json.loads((models / "pretraining.json").read_text())
    assert list(record["parts"]) == PARTS
    for part in record["parts"].values():
        assert part["steps"] == 2
        assert part["seconds"] > 0
    losses = record["parts"]["text_to_image"]
    assert min(losses[f"{name}_caption"] for name in ("true", "no", "wrong")) > 0
    assert record["settings"]["seed"] == 0


def test_finished_parts_are_not_trained_again(models: Path) -> None:
    before = {file: file.read_bytes() for file in models.rglob("*") if file.is_file()}
    record = pretrain(models, recipe=RECIPE)
    assert list(record["parts"]) == PARTS
    assert {file: file.read_bytes() for file in models.rglob("*") if file.is_file()} == before


def test_other_settings_are_refused(models: Path) -> None:
    with pytest.raises(RunError, match=r"another run \(vae_steps: 2 there, 3 here\)"):
        pretrain(models, recipe=replace(RECIPE, vae_steps=3))


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("…")
    with pytest.raises(RunError, match="is not empty"):
        pretrain(tmp_path, recipe=RECIPE)


def test_pictures_are_only_of_their_split() -> None:
    for seed in (0, 7):
        train, validation = Pictures("train", seed, 9_000), Pictures("validation", seed, 256)
        assert {scenes.split_of(scene) for scene in train.scenes} == {"train"}
        assert {scenes.split_of(scene) for scene in validation.scenes} == {"validation"}
        assert not any(scenes.is_held_out(scene) for scene in train.scenes + validation.scenes)


def test_annotations_are_not_captions() -> None:
    pictures = Pictures("train", 0, 40)
    for i, scene in enumerate(pictures.scenes):
        targets = [annotation(pictures, i, task) for task in PROMPTS]
        for target in targets:
            assert not any(size in target for size in scenes.SIZES)
            assert "left" not in target
            assert "above" not in target
            colours = sum(target.count(thing.colour) for thing in (scene.first, scene.second))
            shapes = sum(target.count(thing.shape) for thing in (scene.first, scene.second))
            assert not (colours and shapes)  # which colour a shape has is never told


def test_texts_of_the_language_model_pair_no_colour_with_a_shape() -> None:
    rng = np.random.default_rng(0)
    named = [*scenes.COLOURS, *scenes.SHAPES]
    for scene in scenes.sample(0, 200):
        text = partial_text(scene, rng)
        before, after = text.split(f" {scenes.PHRASES[scene.relation]} ")
        phrases = (before, after.removesuffix(f" on a {scene.background} background"))
        for thing, phrase in zip((scene.first, scene.second), phrases, strict=True):
            assert phrase.split()[:2] == ["a", thing.size]
            said = [word for word in phrase.split() if word in named]
            assert len(said) == 1
            assert said[0] in (thing.colour, thing.shape)
        assert scenes.parse(text) is None  # no caption of ours


def test_boxes_are_where_the_objects_are_drawn() -> None:
    pictures = Pictures("train", 0, 20)
    for i, square in enumerate(pictures.squares):
        places = annotation(pictures, i, "<OD>").split("<loc_")[1:5]
        x1, y1, x2, y2 = (int(place.split(">")[0]) for place in places)
        inside = square[:, 4 * y1 : 4 * y2 + 4, 4 * x1 : 4 * x2 + 4].float()
        assert (inside - square[:, :1, :1]).abs().amax() > 40  # an object is in its box


def test_patches_are_labelled_with_what_covers_them() -> None:
    pictures = Pictures("train", 0, 30)
    labels = patch_labels(pictures, 8)
    for scene, square, patches in zip(pictures.scenes, pictures.squares, labels, strict=True):
        words = {
            tuple(kind[n - 1] for kind, n in zip(KINDS, patch, strict=True))
            for patch in patches.tolist()
            if patch[0]
        }
        things = {(o.shape, o.colour, o.size) for o in (scene.first, scene.second)}
        assert words == things
        # Of the four pixels around a patch's centre one at least is free of any object.
        around = square.unflatten(1, (8, 8)).unflatten(3, (8, 8))[:, :, 3:5, :, 3:5]  # [3 8 2 8 2]
        plain = (around - square[:, :1, :1, None, None]).abs().amax(0).amin((1, 3)) < 10
        assert plain.flatten()[patches[:, 0] == 0].all()


def test_shipped_stage1_weights_open_wherever_they_are_moved(models: Path, tmp_path: Path) -> None:
    config, _ = resolve_model(models)
    trained = VLVAutoEncoder.from_pretrained(config)
    with torch.no_grad():
        trained.encoder.learnable_queries.add_(1)
    about = CheckpointMetadata(
        stage="stage1", step=5, rows_seen=9, config={"run_dir": str(tmp_path)}, model=config
    )
    run = save_checkpoint(tmp_path / "run", trained, about)
    shipped = ship_stage1(run, models, models.parent / "stage1")
    assert str(tmp_path) not in (shipped / "checkpoint.json").read_text()
    assert read_checkpoint(shipped).step == 5
    moved = Path(shutil.copytree(models.parent, tmp_path / "elsewhere")) / "stage1"
    opened = VLVAutoEncoder.from_pretrained(moved)
    assert torch.equal(opened.encoder.learnable_queries, trained.encoder.learnable_queries)
    with pytest.raises(RunError, match="exists already"):
        ship_stage1(run, models, shipped)
    other = write_tiny_models(tmp_path / "other", seed=3)
    with pytest.raises(CheckpointError, match="trained with another"):
        ship_stage1(run, other, tmp_path / "third")
