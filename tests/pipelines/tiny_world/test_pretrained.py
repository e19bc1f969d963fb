"""The shipped weights, and the method on them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.pretraining.fitting import Pictures
from pipelines.demo.proof import denoising
from pipelines.tiny_world import pretrained, scenes
from pipelines.tiny_world.scoring import score_captions
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.weights import stages_of

MODELS, STAGE1 = pretrained.FOLDER / pretrained.MODELS, pretrained.FOLDER / pretrained.STAGE1
STAGE2 = pretrained.FOLDER / pretrained.STAGE2


def test_all_weights_are_small_and_safe() -> None:
    files = [file for file in pretrained.FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    kinds = {file.suffix for file in files} - {".pyc"}
    assert kinds <= {".py", ".json", ".txt", ".safetensors"}
    for file in pretrained.FOLDER.rglob("config.json"):  # no path of who trained them
        assert not json.loads(file.read_text()).get("_name_or_path"), file
    for file in MODELS.rglob("*.safetensors"):
        assert {t.dtype for t in load_file(file).values()} == {torch.float16}, file


def test_the_record_has_all_parts_and_no_absolute_path() -> None:
    record = json.loads((MODELS / "pretraining.json").read_text())
    parts = ["vae", "text_encoder", "text_to_image", "vision", "florence", "language_model"]
    assert sorted(record["parts"]) == sorted(parts)
    for name in parts:
        assert record["parts"][name]["steps"] == record["settings"][f"{name}_steps"]
    for checkpoint in (STAGE1, STAGE2):
        model = json.loads((checkpoint / "checkpoint.json").read_text())["model"]
        for part in ("florence", "diffusion", "language_model"):
            assert not Path(model[part]).is_absolute()


def test_stage1_weights_fit_the_models() -> None:
    assert stages_of(STAGE1) == ["stage1"]
    VLVAutoEncoder.from_pretrained(STAGE1)  # fingerprints of all base models are checked


def test_the_captioner_describes_unseen_scenes(test_pictures: Pictures) -> None:
    assert stages_of(STAGE2) == ["stage1", "stage2"]
    captioner = VLVCaptioner.from_pretrained(STAGE2)
    pictures = [
        Image.fromarray(square) for square in test_pictures.squares.permute(0, 2, 3, 1).numpy()
    ]
    captions = captioner.caption(pictures, num_beams=1, max_new_tokens=60)
    assert score_captions(test_pictures.scenes, captions)["exact_match"] > 0.9


@pytest.fixture
def test_pictures() -> Pictures:
    return Pictures("test", 11, 64)


def test_the_encoder_beats_no_caption_on_unseen_scenes(test_pictures: Pictures) -> None:
    autoencoder = VLVAutoEncoder.from_pretrained(STAGE1)
    losses = denoising(autoencoder, test_pictures.squares, test_pictures.scenes)
    assert losses["true_caption"] < losses["no_caption"] < losses["wrong_caption"]
    assert losses["gap_closed"] > 0.5


@pytest.mark.faults
def test_a_few_dozen_steps_beat_no_caption(test_pictures: Pictures) -> None:
    """From the pretrained parts, on images of training scenes, without captions."""
    torch.manual_seed(0)
    autoencoder = VLVAutoEncoder.from_pretrained(MODELS).train()
    pictures = Pictures("train", 5, 256)
    trainable = [p for p in autoencoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for _ in range(36):
        rows = torch.randint(pictures.count, (16,), generator=generator)
        noise = torch.randn(16, *autoencoder.latent_shape, generator=generator)
        timesteps = torch.randint(1000, (16,), generator=generator)
        loss = autoencoder.loss(pictures.squares[rows], noise, timesteps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
    losses = denoising(autoencoder, test_pictures.squares, test_pictures.scenes)
    assert losses["encoder"] < losses["no_caption"]
    assert not any(scenes.is_held_out(scene) for scene in pictures.scenes)
