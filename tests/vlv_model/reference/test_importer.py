"""Checkpoints in the published implementation's layout are imported."""

import contextlib
import copy
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.vlv_model import published_layout
from vlv_model.errors import CheckpointError
from vlv_model.reference.importer import fill, stage_of
from vlv_model.reference.state_dicts import Reference, read_reference

LACKING = 3  # rows of the words that transformers added and the published vocabulary lacks


def moved(model):
    """Change all weights, also of frozen parts, except the rows the published vocabulary lacks."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            change = 0.05 * torch.randn_like(parameter)
            if parameter is model.encoder.florence.language_model.shared.weight:
                change[-LACKING:] = 0
            parameter.add_(change)
    return model


@pytest.fixture(scope="module")
def base(_captioner):
    """The model to import into; a rejected import must not change it."""
    return copy.deepcopy(_captioner)


@pytest.fixture(scope="module")
def published(_captioner):
    """A captioner, and its state dict as the published implementation would save it."""
    model = moved(_captioner)
    return model, {n: t.detach() for n, t in published_layout.stage2(model, LACKING).items()}


@pytest.fixture(scope="module")
def published_stage1(_autoencoder):
    model = moved(_autoencoder)
    return model, {n: t.detach() for n, t in published_layout.stage1(model, LACKING).items()}


def as_reference(tensors, **more) -> Reference:
    return Reference(tensors, {}, None, **({"omits_shared": False} | more))


def same(one, other) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def refused(path, match) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        read_reference(path)
    assert "\n" not in str(error.value)


def test_a_stage_2_file_gives_the_same_captioner(published, captioner, tmp_path, squares):
    model, tensors = published
    file = tmp_path / "step_70" / "model.pt"
    file.parent.mkdir()
    torch.save(tensors, file)
    reference = read_reference(file.parent)
    assert (reference.step, stage_of(reference)) == (70, "stage2")
    report = fill(captioner, reference)
    torch.testing.assert_close(
        captioner.prefix(squares), model.prefix(squares), rtol=1e-6, atol=1e-6
    )
    assert captioner.generate(squares, max_new_tokens=8) == model.generate(
        squares, max_new_tokens=8
    )
    notes = "\n".join(report.notes)
    rows = tensors["VLV_model.model.language_model.model.shared.weight"].shape[0]
    for note in (
        "VLV_model.model.image_projection: transposed",
        f"shared.weight: {rows} rows of {rows + LACKING}",
        "lm_head.weight: dropped, unused: equal to the token embeddings",
        "final_logits_bias: dropped, unused: all zero",
        "vision tower: frozen in the method, but",
    ):
        assert note in notes
    assert report.to_json()["parts"]["vision tower"]["frozen"]
    assert sum(part.tensors for part in report.parts.values()) == len(list(model.parameters())) + 1


def test_a_stage_1_file_gives_the_same_auto_encoder(published_stage1, autoencoder, squares):
    model, tensors = published_stage1
    fill(autoencoder, as_reference(tensors))
    assert same(autoencoder, model)
    noise = torch.randn(len(squares), *model.latent_shape)
    inputs = (squares, noise, torch.tensor([5, 300, 600, 999]))
    mean = torch.zeros_like(noise)
    ours, theirs = (m.loss(*inputs, posterior_noise=mean) for m in (autoencoder, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_vae_and_unet_may_be_left_out_as_a_whole(published_stage1, autoencoder):
    model, tensors = published_stage1
    base = copy.deepcopy(autoencoder.diffusion_decoder)
    kept = {n: t for n, t in tensors.items() if not n.startswith(("vae.", "unet."))}
    notes = fill(autoencoder, as_reference(kept)).notes
    assert same(autoencoder.encoder, model.encoder)
    assert same(autoencoder.diffusion_decoder, base)
    assert "UNet: not in the checkpoint, the base model's is used" in notes


def test_frozen_parts_are_compared_with_the_base_model(captioner):
    tensors = {n: t.detach().bfloat16() for n, t in published_layout.stage2(captioner).items()}
    report = fill(captioner, as_reference(tensors))
    for part in ("vision tower", "text encoder", "token embeddings"):
        assert report.parts[part].different == 0
        assert report.parts[part].equal_in_bfloat16 > 0
    assert not any("frozen in the method" in note for note in report.notes)
    report = fill(captioner, as_reference(tensors))
    assert all(part.equal == part.tensors for part in report.parts.values())
    assert "text encoder" in report.text()


def rename(tensors, name):
    return {n + "_" * (n == name): t for n, t in tensors.items()}


CHANGES = {
    "drop": lambda tensors, name: {n: t for n, t in tensors.items() if n != name},
    "add": lambda tensors, name: tensors | {name + ".extra": tensors[name]},
    "rename": rename,
    "reshape": lambda tensors, name: tensors | {name: tensors[name][None]},
    "cut": lambda tensors, name: tensors | {name: tensors[name][..., :-1]},
    "spoil": lambda tensors, name: tensors | {name: torch.full_like(tensors[name], torch.nan)},
}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_other_key_or_shape_is_an_error_that_names_it(published, base, data):
    name = data.draw(st.sampled_from(sorted(published[1])))
    change = data.draw(st.sampled_from(sorted(CHANGES)))
    before = {n: t.clone() for n, t in base.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        fill(base, as_reference(CHANGES[change](published[1], name)))
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_tied_weights_that_differ_are_rejected(published, captioner):
    head = "qwen2_model.lm_head.weight"
    tensors = published[1] | {head: published[1][head] + 1}
    with pytest.raises(CheckpointError, match=f"{head} differ, but are one tensor in our model"):
        fill(captioner, as_reference(tensors))


def test_position_ids_of_older_versions_are_dropped_if_they_only_count(published, captioner):
    name = "VLV_model.text_encoder.text_model.embeddings.position_ids"
    count = captioner.text_encoder.max_length
    report = fill(captioner, as_reference(published[1] | {name: torch.arange(count)[None]}))
    assert f"{name}: dropped, 0, 1, 2, …" in report.notes
    with pytest.raises(CheckpointError, match="is not 0, 1, 2"):
        fill(captioner, as_reference(published[1] | {name: torch.arange(count).flip(0)[None]}))


# --------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("wrap", ["bare", "prefixed", "model_state_dict", "safetensors", "shards"])
def test_consolidated_files(published, captioner, tmp_path, wrap):
    model, tensors = published
    if wrap == "safetensors":  # which keeps one of tied tensors
        copies = ("embed_tokens.weight", "qwen2_model.lm_head.weight")
        kept = {n: t for n, t in tensors.items() if not n.endswith(copies) or "qwen2_model.mo" in n}
        save_file(
            {n: t.contiguous().clone() for n, t in kept.items()}, tmp_path / "model.safetensors"
        )
    elif wrap == "shards":
        names = sorted(tensors)
        shards = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, inside in shards.items():
            torch.save({n: tensors[n] for n in inside}, tmp_path / file)
        index = {"weight_map": {n: file for file, inside in shards.items() for n in inside}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        prefix = "module." if wrap == "prefixed" else ""
        content = {prefix + n: t for n, t in tensors.items()}
        content = (
            {"model_state_dict": content, "step": 3} if wrap == "model_state_dict" else content
        )
        torch.save(content, tmp_path / "pytorch_model.bin")
    fill(captioner, read_reference(tmp_path))
    assert same(captioner, model)


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_rejected_and_not_run(tmp_path, zipped):
    file, trace = tmp_path / "model.pt", tmp_path / "was-run"
    content = {"query_embed": torch.zeros(1), "mlp": Evil(trace)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    refused(file, "model.pt' is rejected: .* could run code")
    assert not trace.exists()
    torch.load(file, weights_only=False)  # it would have
    assert trace.exists()


def test_a_path_without_a_checkpoint_is_rejected_in_one_line(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "holds no checkpoint of the published implementation")
    (tmp_path / "model.pt").write_bytes(b"not a torch file")
    refused(tmp_path, r"model\.pt' ")
    torch.save([torch.zeros(1)], tmp_path / "model.pt")
    refused(tmp_path, "is not a state dict")
    torch.save({"step": 3}, tmp_path / "model.pt")
    refused(tmp_path, "is not a state dict")
    (tmp_path / "model.pt").rename(tmp_path / "model.safetensors")
    refused(tmp_path, "cannot be read")


@pytest.mark.end_to_end
def test_deepspeed_checkpoints_give_the_float32_weights(forked_python, tmp_path):
    """Two real workers: ZeRO-2 in float32 and bfloat16, ZeRO-3."""
    script = Path(__file__).with_name("deepspeed_checkpoints.py")
    subprocess.run([forked_python, str(script), str(tmp_path)], check=True, timeout=300)
    for folder in sorted(path for path in tmp_path.iterdir() if path.is_dir()):
        expected = torch.load(folder / "masters.pt", weights_only=True)
        found = read_reference(folder)
        assert found.step == 3
        assert found.tensors.keys() == expected.keys(), folder.name
        for name, tensor in expected.items():
            assert torch.equal(found.tensors[name].float(), tensor.float()), (folder.name, name)


# ----------------------------------------------------------------------- odd and malformed files


def test_of_untied_token_embeddings_the_prompts_are_used(published, captioner):
    shared = "VLV_model.model.language_model.model.shared.weight"
    other = "VLV_model.model.language_model.model.decoder.embed_tokens.weight"
    trained = {shared: published[1][shared] + 1, other: published[1][other] + 2}
    report = fill(captioner, as_reference(published[1] | trained))
    table = captioner.encoder.florence.language_model.shared.weight
    assert torch.equal(table[: len(trained[shared])], trained[shared])
    assert any(
        note.startswith(f"{other}: dropped, different from {shared}") for note in report.notes
    )
    assert not any("token embeddings: frozen" in note for note in report.notes)
    assert not report.to_json()["parts"]["token embeddings"]["frozen"]


def test_names_of_compiled_models_are_read(published, captioner, tmp_path):
    model, tensors = published
    torch.save({f"module._orig_mod.{n}": t for n, t in tensors.items()}, tmp_path / "model.pt")
    fill(captioner, read_reference(tmp_path))
    assert same(captioner, model)


def test_the_last_of_several_steps_is_imported(tmp_path):
    for step in (900, 1000, 80):
        torch.save({"query_embed": torch.full((1,), step)}, tmp_path / f"checkpoint_{step}.pt")
    found = read_reference(tmp_path)
    assert (found.step, found.tensors["query_embed"].item()) == (1000, 1000)


class Settings:
    """An object that is not a tensor."""


def test_a_refused_class_is_named(tmp_path):
    torch.save({"model_state_dict": {}, "args": Settings()}, tmp_path / "model.pt")
    refused(tmp_path, rf"could run code \('{__name__}\.Settings'\)")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({1: torch.zeros(1)}, "is not a state dict"),
        ({"a": torch.zeros(1, device="meta")}, "has a as a tensor that is without values"),
        ({"a": torch.eye(3).to_sparse()}, "has a as a tensor that is sparse"),
    ],
)
def test_a_tensor_that_is_not_dense_is_rejected(tmp_path, content, match):
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path, match)


def test_numbers_of_another_kind_are_rejected(published, captioner):
    name = "mlp.layers.0.weight"
    with pytest.raises(CheckpointError, match=rf"{name} is torch.int64, expected floating"):
        fill(captioner, as_reference(published[1] | {name: published[1][name].long()}))
    shared = "VLV_model.model.language_model.model.shared.weight"
    with pytest.raises(CheckpointError, match=f"of another shape .*{shared}"):
        fill(captioner, as_reference(published[1] | {shared: torch.tensor(1.0)}))


def malformed(folder: Path, draw: random.Random) -> Path:
    """A checkpoint of a random kind with bytes changed, removed, doubled or moved."""
    kind = draw.choice(["zip", "legacy", "safetensors", "index", "latest", "deepspeed"])
    tensors = {name: torch.randn(3, 4) for name in ("query_embed", "mlp.layers.0.weight")}
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif kind == "index":
        save_file(tensors, folder / "a.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "deepspeed":
        shapes = [{name: tensor.shape for name, tensor in tensors.items()}]
        low = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        states = folder / "mp_rank_00_model_states.pt"
        torch.save({"module": low, "param_shapes": shapes}, states)
        flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
        part = {"partition_count": 1, "single_partition_of_fp32_groups": [flat]}
        file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": part}, file)
    else:
        inside = folder / "step_7" if kind == "latest" else folder
        inside.mkdir(exist_ok=True)
        torch.save(tensors, inside / "model.pt", _use_new_zipfile_serialization=kind != "legacy")
        if kind == "latest":
            (folder / "latest").write_text("step_7")
    file = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 8)):
        if not content:
            break
        at, length = draw.randrange(len(content)), draw.randint(1, 64)
        match draw.choice(["flip", "cut", "lose", "double", "text"]):
            case "flip":
                content[at] ^= 1 << draw.randrange(8)
            case "cut":
                del content[at:]
            case "lose":
                del content[at : at + length]
            case "double":
                content[at:at] = content[at : at + length]
            case "text":
                content[at : at + 4] = draw.choice([b"null", b"[1]}", b"\xff\xfe", b"-1e9", b"{}"])
    file.write_bytes(content)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(10))
def test_malformed_files_give_one_line_each(tmp_path, seed):
    draw = random.Random(seed)
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        with contextlib.suppress(CheckpointError):  # whose message is one line
            found = read_reference(malformed(folder, draw))
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.tensors.values())
