"""Saving and loading one checkpoint, and the errors of bad ones."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.vlv_model.made_checkpoints import metadata, refused, same_weights, tamper
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.digests import sha256_of
from vlv_model.checkpoints.files import write_checkpoint, write_checkpoint_files
from vlv_model.checkpoints.weights import load_checkpoint, read_checkpoint, save_checkpoint
from vlv_model.encoder import VLVEncoder
from vlv_model.errors import CheckpointError
from vlv_model.tiny import write_tiny_models


def test_only_trained_weights_are_saved_and_they_load_exactly(stage1, trained_autoencoder):
    weights = load_file(stage1 / "model.safetensors")
    trained = {n for n, p in trained_autoencoder.named_parameters() if p.requires_grad}
    assert weights.keys() == trained
    assert all(name.startswith("encoder.") for name in trained)
    assert same_weights(VLVAutoEncoder.from_pretrained(stage1), trained_autoencoder)
    assert same_weights(VLVEncoder.from_pretrained(stage1), trained_autoencoder.encoder)
    assert sorted(path.name for path in stage1.iterdir()) == [
        "checkpoint.json",
        "model.safetensors",
    ]
    assert [path.name for path in stage1.parent.iterdir()] == ["step_7"]  # no temporary left


def test_model_folder_and_checkpoint_can_be_given_separately(tiny, stage1, trained_autoencoder):
    assert same_weights(
        VLVAutoEncoder.from_pretrained(tiny, checkpoint=stage1), trained_autoencoder
    )


def test_checkpoint_json_records_its_origin(tiny, stage1):
    info = read_checkpoint(stage1)
    assert (info.stage, info.step, info.rows_seen) == ("stage1", 7, 112)
    assert info.config == {"learning_rate": 5e-5}
    assert info.model.florence == str(tiny / "florence")
    assert info.base_models.keys() == {"florence", "text_encoder", "unet", "vae"}
    assert info.tensors["encoder.learnable_queries"] == [1, 16, 64]
    assert info.sha256 == sha256_of(stage1 / "model.safetensors")
    assert info.parent is None


def test_a_stage_1_checkpoint_opens_a_captioner_for_training_only(stage1, trained_autoencoder):
    captioner = VLVCaptioner.from_pretrained(stage1, for_training=True)
    assert same_weights(captioner.encoder, trained_autoencoder.encoder)
    refused(stage1, "leaves language_projector untrained", VLVCaptioner)


def test_missing_unexpected_and_misshapen_tensors_are_named(stage1):
    def change(weights):
        del weights["encoder.caption_projector.0.bias"]
        weights["encoder.learnable_queries"] = weights["encoder.learnable_queries"][:, :5].clone()
        return weights | {f"encoder.extra.{i}": torch.zeros(1) for i in range(9)}

    tamper(stage1, change)
    refused(stage1, r"9 tensors unexpected \(encoder.extra.0, .*, \.\.\.\)")
    refused(stage1, r"1 tensors missing \(encoder.caption_projector.0.bias\)")
    refused(stage1, r"1 tensors of another shape \(encoder.learnable_queries \[1, 5, 64\] for")


def test_a_failed_load_changes_nothing(stage1, trained_autoencoder):
    fresh = {name: p.clone() for name, p in trained_autoencoder.named_parameters()}
    last = "encoder.caption_projector.2.weight"
    tamper(stage1, lambda weights: {n: t for n, t in weights.items() if n != last})
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        load_checkpoint(stage1, trained_autoencoder)
    assert all(torch.equal(p, fresh[name]) for name, p in trained_autoencoder.named_parameters())


def test_a_damaged_file_is_rejected(stage1):
    path = stage1 / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(stage1, "is damaged: its digest is")
    path.unlink()
    refused(stage1, "lacks model.safetensors")


def test_a_pickle_with_a_matching_digest_is_rejected(stage1):
    path = stage1 / "model.safetensors"
    torch.save(
        {name: torch.zeros(shape) for name, shape in read_checkpoint(stage1).tensors.items()}, path
    )
    info = json.loads((stage1 / "checkpoint.json").read_text())
    info["sha256"] = sha256_of(path)
    (stage1 / "checkpoint.json").write_text(json.dumps(info))
    refused(stage1, "is not a safetensors file")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 99}, "format version 99, this program reads 1"),
        ({"step": -1}, "step: "),
        ({"surprise": 1}, "surprise: "),
    ],
)
def test_another_format_is_rejected(stage1, trained_autoencoder, change, match):
    path = stage1 / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(stage1, trained_autoencoder)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(stage1, trained_autoencoder)


def test_other_base_models_are_rejected(tiny, tmp_path, stage1):
    other = write_tiny_models(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="was trained with another "):
        VLVAutoEncoder.from_pretrained(other, checkpoint=stage1)
    copied = shutil.copytree(tiny, tmp_path / "copied")
    VLVAutoEncoder.from_pretrained(copied, checkpoint=stage1)  # elsewhere, but the same


def test_another_language_model_may_follow_stage_1(tmp_path, stage1):
    other = write_tiny_models(tmp_path / "other", seed=1)
    model = read_checkpoint(stage1).model
    model = model.model_copy(update={"language_model": str(other / "language_model")})
    VLVCaptioner.from_pretrained(model, checkpoint=stage1, for_training=True)


def test_a_folder_is_written_once_and_atomically(tiny, tmp_path, stage1, trained_autoencoder):
    with pytest.raises(CheckpointError, match="already exists"):
        save_checkpoint(stage1, trained_autoencoder, metadata(tiny))
    about = metadata(tiny, parent=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        save_checkpoint(tmp_path / "run4" / "step_1", trained_autoencoder, about)
    assert not (tmp_path / "run4").exists()
    with pytest.raises(CheckpointError, match="no trainable weights"):
        save_checkpoint(tmp_path / "x", trained_autoencoder.requires_grad_(False), metadata(tiny))
    with pytest.raises(ValidationError):  # after the weights were written
        write_checkpoint(tmp_path / "run4" / "step_1", {"x": torch.zeros(1)}, {"stage": "stage3"})
    assert list((tmp_path / "run4").iterdir()) == []


def trainable(module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}


def test_given_weights_are_written_instead_of_the_modules(tiny, tmp_path, trained_autoencoder):
    """float32 master copies of a bfloat16 module, as in DeepSpeed: views of one buffer."""
    own = trainable(trained_autoencoder)
    flat = torch.randn(sum(p.numel() for p in own.values()))
    parts = flat.split([p.numel() for p in own.values()])
    masters = {n: t.view_as(own[n]) for n, t in zip(own, parts, strict=True)}
    trained_autoencoder.to(torch.bfloat16)
    folder = save_checkpoint(tmp_path / "a", trained_autoencoder, metadata(tiny), weights=masters)
    written = load_file(folder / "model.safetensors")
    assert written.keys() == masters.keys()
    assert all(torch.equal(written[n], t) for n, t in masters.items())


def test_weights_are_written_in_float32(tiny, tmp_path, trained_autoencoder):
    trained_autoencoder.to(torch.bfloat16)
    folder = save_checkpoint(tmp_path / "a", trained_autoencoder, metadata(tiny))
    written = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert all(
        torch.equal(written[n], p.float()) for n, p in trainable(trained_autoencoder).items()
    )


QUERIES = "encoder.learnable_queries"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w | {"text_encoder.x": torch.zeros(1)}, r"1 tensors unexpected \(text_enc"),
        (lambda w: {n: t for n, t in w.items() if n != QUERIES}, rf"1 tensors missing \({QUERIES}"),
        (lambda w: w | {QUERIES: w[QUERIES][0]}, rf"another shape \({QUERIES} \[16, 64\] for \[1"),
        (lambda w: w | {QUERIES: torch.zeros(0)}, rf"1 tensors empty \({QUERIES}\)"),
    ],
)
def test_given_weights_that_are_not_the_trainable_ones_are_rejected(
    tiny, tmp_path, trained_autoencoder, change, match
):
    weights = change(trainable(trained_autoencoder))
    with pytest.raises(CheckpointError, match=match) as error:
        save_checkpoint(tmp_path / "a", trained_autoencoder, metadata(tiny), weights=weights)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_empty_zero_3_parameters_are_not_saved(tiny, tmp_path, trained_autoencoder):
    whole = {name: tensor.clone() for name, tensor in trainable(trained_autoencoder).items()}
    for parameter in trained_autoencoder.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    with pytest.raises(CheckpointError, match=r"\d+ tensors empty .*gather the whole tensors"):
        save_checkpoint(tmp_path / "a", trained_autoencoder, metadata(tiny))
    folder = save_checkpoint(tmp_path / "a", trained_autoencoder, metadata(tiny), weights=whole)
    assert torch.equal(load_file(folder / "model.safetensors")[QUERIES], whole[QUERIES])
    wrong = whole | {QUERIES: whole[QUERIES][0]}
    with pytest.raises(CheckpointError, match="another shape"):
        save_checkpoint(tmp_path / "b", trained_autoencoder, metadata(tiny), weights=wrong)


def test_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=rf"^cannot write '{tmp_path}': .* No space left"):
        write_checkpoint_files(tmp_path, {}, {})
