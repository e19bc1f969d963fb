"""Checkpoints with parents: loading and merging them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.vlv_model.made_checkpoints import metadata, refused, relink, same_weights, shift, tamper
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.weights import (
    merge_checkpoint,
    read_checkpoint,
    save_checkpoint,
    stages_of,
)
from vlv_model.encoder import VLVEncoder
from vlv_model.errors import CheckpointError


def test_a_stage_2_checkpoint_loads_its_parent(stage1, stage2):
    folder, captioner = stage2
    names = load_file(folder / "model.safetensors").keys()
    assert "encoder.learnable_queries" not in names
    assert any(name.startswith("encoder.florence.language_model.") for name in names)
    info = read_checkpoint(folder)
    assert info.parent.path == "../../run1/step_7"
    assert info.base_models.keys() == {"florence", "text_encoder", "language_model"}
    assert same_weights(VLVCaptioner.from_pretrained(folder), captioner)


def test_both_may_move_together(tmp_path, stage2):
    _, captioner = stage2
    moved = tmp_path / "moved"
    moved.mkdir()
    for run in ("run1", "run2"):
        shutil.move(tmp_path / run, moved / run)
    assert same_weights(VLVCaptioner.from_pretrained(moved / "run2" / "step_7"), captioner)


@pytest.mark.parametrize("trainable", ["projector", "projector+llm"])
def test_what_stage_2_did_not_train_comes_from_the_parent(tiny, tmp_path, stage1, trainable):
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True)
    captioner.set_trainable(trainable)
    shift(captioner)
    about = metadata(tiny, "stage2", parent=str(stage1))
    folder = save_checkpoint(tmp_path / "child", captioner, about)
    assert same_weights(VLVCaptioner.from_pretrained(folder), captioner)


def test_a_missing_or_different_parent_is_rejected(tmp_path, stage1, stage2, trained_autoencoder):
    folder, _ = stage2
    tamper(stage1, lambda weights: {n: t + 1 for n, t in weights.items()})
    refused(folder, "is not the parent that", VLVCaptioner)
    shutil.rmtree(stage1)
    refused(folder, "the parent of .* is not at", VLVCaptioner)


def test_a_circle_of_parents_is_rejected(stage1):
    path = stage1 / "checkpoint.json"
    info = json.loads(path.read_text())
    info["parent"] = {"path": ".", "sha256": info["sha256"]}
    path.write_text(json.dumps(info))
    refused(stage1, "its own ancestor")


def test_the_encoder_of_a_stage_2_checkpoint_can_be_opened_alone(stage2):
    folder, captioner = stage2
    assert same_weights(VLVEncoder.from_pretrained(folder), captioner.encoder)
    assert same_weights(VLVAutoEncoder.from_pretrained(folder).encoder, captioner.encoder)


@pytest.mark.parametrize("kind", [VLVEncoder, VLVAutoEncoder])
def test_only_the_parts_of_stage_2_are_ignored(stage1, stage2, kind):
    folder, _ = stage2
    tamper(stage1, lambda weights: weights | {"language_model.x": torch.zeros(1)})
    refused(stage1, r"1 tensors unexpected \(language_model.x\)", kind)
    tamper(folder, lambda weights: weights | {"language_modelling.x": torch.zeros(1)})
    relink(folder, stage1)
    tamper(stage1, lambda weights: {n: t for n, t in weights.items() if "encoder." in n})
    relink(folder, stage1)
    refused(folder, r"1 tensors unexpected \(language_modelling.x\)", kind)


def test_the_encoder_of_a_stage_2_checkpoint_is_complete(stage2):
    folder, _ = stage2
    lost = "encoder.florence.language_model.decoder.layers.0.fc1.bias"
    tamper(folder, lambda weights: {n: t for n, t in weights.items() if n != lost})
    refused(folder, rf"1 tensors missing \({lost}\)", VLVEncoder)


def test_a_merged_chain_stands_alone(tmp_path, chain):
    (a, b, c), captioner = chain
    expected = load_file(a / "model.safetensors") | load_file(b / "model.safetensors")
    expected |= load_file(c / "model.safetensors")
    own, first = read_checkpoint(c), read_checkpoint(a)
    merged = merge_checkpoint(c, tmp_path / "merged")
    for run in ("run1", "run2", "run3"):
        shutil.rmtree(tmp_path / run)
    written = load_file(merged / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[n], t) for n, t in expected.items())
    assert same_weights(VLVCaptioner.from_pretrained(merged), captioner)
    info = read_checkpoint(merged)
    changed = {"parent", "tensors", "sha256", "merged_stages", "base_models"}
    assert info.base_models == {**first.base_models, **own.base_models}  # the UNet's too
    assert "unet" in info.base_models
    assert info.model_dump(exclude=changed) == own.model_dump(exclude=changed)
    assert (info.parent, info.step) == (None, 9)
    with pytest.raises(CheckpointError, match="already exists"):
        merge_checkpoint(merged, merged)


def test_the_stages_of_a_chain_are_known_also_when_it_is_merged(tiny, tmp_path, chain):
    (a, b, c), captioner = chain
    assert stages_of(a) == ["stage1"]
    assert stages_of(b) == ["stage1", "stage2"]
    assert stages_of(c) == ["stage1", "stage2", "stage2"]
    merged = merge_checkpoint(b, tmp_path / "merged")
    about = metadata(tiny, "stage2", parent=str(merged))
    child = save_checkpoint(tmp_path / "child", captioner, about)
    assert stages_of(child) == stages_of(c)
    assert stages_of(merge_checkpoint(child, tmp_path / "again")) == stages_of(c)


@pytest.mark.parametrize("use", [stages_of, lambda folder: merge_checkpoint(folder, "merged")])
@pytest.mark.parametrize("ancestor", [0, 1, 2])
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: shutil.rmtree(folder), "is not at|is not a checkpoint"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"format'), "is not a checkpoint"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "is damaged"),
    ],
)
def test_damage_anywhere_in_a_chain_is_found(
    tmp_path, chain, monkeypatch, use, ancestor, damage, match
):
    monkeypatch.chdir(tmp_path)
    damage(chain[0][ancestor])
    with pytest.raises(CheckpointError, match=match) as error:
        use(chain[0][2])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()


def test_another_parent_in_a_chain_is_found(chain):
    tamper(chain[0][1], lambda weights: {n: t + 1 for n, t in weights.items()})
    for use in (stages_of, lambda folder: merge_checkpoint(folder, folder / "merged")):
        with pytest.raises(CheckpointError, match="is not the parent that"):
            use(chain[0][2])
