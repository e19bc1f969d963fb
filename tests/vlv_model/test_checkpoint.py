import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoint import (
    CheckpointMetadata,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from vlv_model.encoder import VLVEncoder
from vlv_model.errors import CheckpointError
from vlv_model.fingerprint import sha256_of
from vlv_model.loading import resolve_model
from vlv_model.tiny import write_tiny_models


def shift(module) -> None:
    """Stands for training: every trainable tensor moves."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def metadata(tiny, stage="stage1", **more) -> CheckpointMetadata:
    model, _ = resolve_model(tiny)
    values = {"step": 7, "rows_seen": 112, "config": {"learning_rate": 5e-5}, "model": model}
    return CheckpointMetadata(stage=stage, **(values | more))


@pytest.fixture
def stage1(tiny, tmp_path, autoencoder):
    shift(autoencoder)
    return save_checkpoint(tmp_path / "run1" / "step_7", autoencoder, metadata(tiny))


@pytest.fixture
def stage2(tiny, tmp_path, stage1):
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True)
    shift(captioner)
    about = metadata(tiny, "stage2", parent=str(stage1))
    return save_checkpoint(tmp_path / "run2" / "step_7", captioner, about), captioner


def same_weights(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def tamper(folder, change) -> None:
    """Rewrite the weights and make the digest fit again."""
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(weights), path)  # clones: the file under a mapped tensor must not change
    info = json.loads((folder / "checkpoint.json").read_text())
    info["sha256"] = sha256_of(path)
    (folder / "checkpoint.json").write_text(json.dumps(info))


def refused(folder, match, kind=VLVAutoEncoder):
    with pytest.raises(CheckpointError, match=match) as error:
        kind.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_only_trained_weights_are_written_and_come_back_exactly(stage1, autoencoder):
    weights = load_file(stage1 / "model.safetensors")
    trained = {n for n, p in autoencoder.named_parameters() if p.requires_grad}
    assert weights.keys() == trained
    assert all(name.startswith("encoder.") for name in trained)
    assert same_weights(VLVAutoEncoder.from_pretrained(stage1), autoencoder)
    assert same_weights(VLVEncoder.from_pretrained(stage1), autoencoder.encoder)
    assert sorted(path.name for path in stage1.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
    ]
    assert [path.name for path in stage1.parent.iterdir()] == ["step_7"]  # no temporary left


def test_the_model_folder_and_the_checkpoint_can_be_named_apart(tiny, stage1, autoencoder):
    assert same_weights(VLVAutoEncoder.from_pretrained(tiny, checkpoint=stage1), autoencoder)


def test_checkpoint_json_says_where_it_comes_from(tiny, stage1):
    info = read_checkpoint(stage1)
    assert (info.stage, info.step, info.rows_seen) == ("stage1", 7, 112)
    assert info.config == {"learning_rate": 5e-5}
    assert info.model.florence == str(tiny / "florence")
    assert info.base_models.keys() == {"florence", "text_encoder", "unet", "vae"}
    assert info.tensors["encoder.learnable_queries"] == [1, 16, 64]
    assert info.sha256 == sha256_of(stage1 / "model.safetensors")
    assert info.parent is None


def test_a_stage_1_checkpoint_opens_a_captioner_for_training_only(stage1, autoencoder):
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True)
    assert same_weights(captioner.encoder, autoencoder.encoder)
    refused(stage1, "leaves language_projector untrained", VLVCaptioner)


def test_a_stage_2_checkpoint_brings_its_parent_along(stage1, stage2):
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


def test_a_parent_that_is_missing_or_another_is_refused(tmp_path, stage1, stage2, autoencoder):
    folder, _ = stage2
    tamper(stage1, lambda weights: {n: t + 1 for n, t in weights.items()})
    refused(folder, "is not the parent that", VLVCaptioner)
    shutil.rmtree(stage1)
    refused(folder, "the parent of .* is not at", VLVCaptioner)


def test_a_circle_of_parents_is_refused(stage1):
    path = stage1 / "checkpoint.json"
    info = json.loads(path.read_text())
    info["parent"] = {"path": ".", "sha256": info["sha256"]}
    path.write_text(json.dumps(info))
    refused(stage1, "its own ancestor")


def test_missing_unexpected_and_misshapen_tensors_are_named(stage1):
    def change(weights):
        del weights["encoder.caption_projector.0.bias"]
        weights["encoder.learnable_queries"] = weights["encoder.learnable_queries"][:, :5].clone()
        return weights | {f"encoder.extra.{i}": torch.zeros(1) for i in range(9)}

    tamper(stage1, change)
    refused(stage1, r"9 tensors unexpected \(encoder.extra.0, .*, \.\.\.\)")
    refused(stage1, r"1 tensors missing \(encoder.caption_projector.0.bias\)")
    refused(stage1, r"1 tensors of another shape \(encoder.learnable_queries \[1, 5, 64\] for")


def test_a_stage_2_checkpoint_does_not_fit_an_autoencoder(stage2):
    refused(stage2[0], r"does not fit VLVAutoEncoder: \d+ tensors unexpected \(language_")


def test_a_failed_load_changes_nothing(stage1, autoencoder):
    fresh = {name: p.clone() for name, p in autoencoder.named_parameters()}
    last = "encoder.caption_projector.2.weight"
    tamper(stage1, lambda weights: {n: t for n, t in weights.items() if n != last})
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        load_checkpoint(stage1, autoencoder)
    assert all(torch.equal(p, fresh[name]) for name, p in autoencoder.named_parameters())


def test_a_damaged_file_is_refused(stage1):
    path = stage1 / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(stage1, "is damaged: its digest is")
    path.unlink()
    refused(stage1, "lacks model.safetensors")


def test_a_pickle_with_a_fitting_digest_is_refused(stage1):
    path = stage1 / "model.safetensors"
    torch.save(
        {name: torch.zeros(shape) for name, shape in read_checkpoint(stage1).tensors.items()}, path
    )
    info = json.loads((stage1 / "checkpoint.json").read_text())
    info["sha256"] = sha256_of(path)
    (stage1 / "checkpoint.json").write_text(json.dumps(info))
    refused(stage1, "is no safetensors file")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 99}, "format version 99, this program reads 1"),
        ({"step": -1}, "step: "),
        ({"surprise": 1}, "surprise: "),
    ],
)
def test_another_format_is_refused(stage1, autoencoder, change, match):
    path = stage1 / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(stage1, autoencoder)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load_checkpoint(stage1, autoencoder)


def test_other_base_models_are_refused(tiny, tmp_path, stage1):
    other = write_tiny_models(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="was trained upon another "):
        VLVAutoEncoder.from_pretrained(other, checkpoint=stage1)
    copied = shutil.copytree(tiny, tmp_path / "copied")
    VLVAutoEncoder.from_pretrained(copied, checkpoint=stage1)  # elsewhere, but the same


def test_another_language_model_may_follow_stage_1(tmp_path, stage1):
    other = write_tiny_models(tmp_path / "other", seed=1)
    model = read_checkpoint(stage1).model
    model = model.model_copy(update={"language_model": str(other / "language_model")})
    VLVCaptioner.from_pretrained(model, checkpoint=stage1, for_training=True)


def test_a_folder_is_written_once_and_whole_or_not_at_all(tiny, tmp_path, stage1, autoencoder):
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(stage1, autoencoder, metadata(tiny))
    about = metadata(tiny, parent=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        save_checkpoint(tmp_path / "run3" / "step_1", autoencoder, about)
    assert list((tmp_path / "run3").iterdir()) == []
    with pytest.raises(CheckpointError, match="no trainable weights"):
        save_checkpoint(tmp_path / "x", autoencoder.requires_grad_(False), metadata(tiny))
