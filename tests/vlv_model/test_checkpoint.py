import copy
import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoint import (
    CheckpointMetadata,
    load_checkpoint,
    merge_checkpoint,
    read_checkpoint,
    save_checkpoint,
    stages_of,
)
from vlv_model.checkpoint_files import write_checkpoint
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


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A -> B -> C: stage 1; stage 2 of everything; stage 2 of the language projector alone."""
    folder = tmp_path_factory.mktemp("trained")
    a, b, c = (folder / run / "step_7" for run in ("run1", "run2", "run3"))
    autoencoder = VLVAutoEncoder.from_pretrained(tiny)
    shift(autoencoder)
    save_checkpoint(a, autoencoder, metadata(tiny))
    middle = VLVCaptioner.from_pretrained(a, for_training=True)
    shift(middle)
    save_checkpoint(b, middle, metadata(tiny, "stage2", parent=str(a)))
    last = copy.deepcopy(middle)
    last.set_trainable("projector")
    shift(last)
    save_checkpoint(c, last, metadata(tiny, "stage2", step=9, parent=str(b)))
    return folder, (autoencoder, middle, last)


@pytest.fixture
def chain(trained, tmp_path):
    """Copies of the three checkpoints, to be spoilt, and the module of the last."""
    folder, modules = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return [tmp_path / run / "step_7" for run in ("run1", "run2", "run3")], modules[2]


@pytest.fixture
def stage1(chain):
    return chain[0][0]


@pytest.fixture
def stage2(chain, trained):
    return chain[0][1], copy.deepcopy(trained[1][1])


@pytest.fixture
def autoencoder(trained):
    """The module of the stage-1 checkpoint."""
    return copy.deepcopy(trained[1][0])


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


def relink(folder, parent) -> None:
    """Make a tampered parent the one that `folder` names."""
    path = folder / "checkpoint.json"
    info = json.loads(path.read_text())
    info["parent"]["sha256"] = read_checkpoint(parent).sha256
    path.write_text(json.dumps(info))


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


def test_the_encoder_of_a_stage_2_checkpoint_can_be_opened_alone(stage2):
    folder, captioner = stage2
    assert same_weights(VLVEncoder.from_pretrained(folder), captioner.encoder)
    assert same_weights(VLVAutoEncoder.from_pretrained(folder).encoder, captioner.encoder)


@pytest.mark.parametrize("kind", [VLVEncoder, VLVAutoEncoder])
def test_of_stage_2_only_its_own_parts_are_passed_over(stage1, stage2, kind):
    folder, _ = stage2
    tamper(stage1, lambda weights: weights | {"language_model.x": torch.zeros(1)})
    refused(stage1, r"1 tensors unexpected \(language_model.x\)", kind)
    tamper(folder, lambda weights: weights | {"language_modelling.x": torch.zeros(1)})
    relink(folder, stage1)
    tamper(stage1, lambda weights: {n: t for n, t in weights.items() if "encoder." in n})
    relink(folder, stage1)
    refused(folder, r"1 tensors unexpected \(language_modelling.x\)", kind)


def test_the_encoder_of_a_stage_2_checkpoint_comes_whole(stage2):
    folder, _ = stage2
    lost = "encoder.florence.language_model.decoder.layers.0.fc1.bias"
    tamper(folder, lambda weights: {n: t for n, t in weights.items() if n != lost})
    refused(folder, rf"1 tensors missing \({lost}\)", VLVEncoder)


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
        save_checkpoint(tmp_path / "run4" / "step_1", autoencoder, about)
    assert not (tmp_path / "run4").exists()
    with pytest.raises(CheckpointError, match="no trainable weights"):
        save_checkpoint(tmp_path / "x", autoencoder.requires_grad_(False), metadata(tiny))
    with pytest.raises(ValidationError):  # after the weights were written
        write_checkpoint(tmp_path / "run4" / "step_1", {"x": torch.zeros(1)}, {"stage": "stage3"})
    assert list((tmp_path / "run4").iterdir()) == []


def trainable(module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}


def test_given_weights_are_written_instead_of_the_modules(tiny, tmp_path, autoencoder):
    """The float32 masters of a bfloat16 module, as DeepSpeed keeps them: views of one buffer."""
    own = trainable(autoencoder)
    flat = torch.randn(sum(p.numel() for p in own.values()))
    parts = flat.split([p.numel() for p in own.values()])
    masters = {n: t.view_as(own[n]) for n, t in zip(own, parts, strict=True)}
    autoencoder.to(torch.bfloat16)
    folder = save_checkpoint(tmp_path / "a", autoencoder, metadata(tiny), weights=masters)
    written = load_file(folder / "model.safetensors")
    assert written.keys() == masters.keys()
    assert all(torch.equal(written[n], t) for n, t in masters.items())


def test_weights_are_written_in_float32(tiny, tmp_path, autoencoder):
    autoencoder.to(torch.bfloat16)
    folder = save_checkpoint(tmp_path / "a", autoencoder, metadata(tiny))
    written = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert all(torch.equal(written[n], p.float()) for n, p in trainable(autoencoder).items())


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
def test_given_weights_that_are_not_the_trainable_ones_are_refused(
    tiny, tmp_path, autoencoder, change, match
):
    weights = change(trainable(autoencoder))
    with pytest.raises(CheckpointError, match=match) as error:
        save_checkpoint(tmp_path / "a", autoencoder, metadata(tiny), weights=weights)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_empty_shells_that_zero_3_leaves_are_not_saved(tiny, tmp_path, autoencoder):
    whole = {name: tensor.clone() for name, tensor in trainable(autoencoder).items()}
    for parameter in autoencoder.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    with pytest.raises(CheckpointError, match=r"\d+ tensors empty .*gather the whole tensors"):
        save_checkpoint(tmp_path / "a", autoencoder, metadata(tiny))
    folder = save_checkpoint(tmp_path / "a", autoencoder, metadata(tiny), weights=whole)
    assert torch.equal(load_file(folder / "model.safetensors")[QUERIES], whole[QUERIES])
    wrong = whole | {QUERIES: whole[QUERIES][0]}
    with pytest.raises(CheckpointError, match="another shape"):
        save_checkpoint(tmp_path / "b", autoencoder, metadata(tiny), weights=wrong)


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
    with pytest.raises(CheckpointError, match="exists already"):
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
        (lambda folder: shutil.rmtree(folder), "is not at|is no checkpoint"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"format'), "is no checkpoint"),
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
