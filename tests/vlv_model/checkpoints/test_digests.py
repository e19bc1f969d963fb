import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vlv_model.checkpoints.digests import (
    SAMPLE_BYTES,
    SAMPLES_PER_FILE,
    fingerprint,
    fingerprint_parts,
    is_digest,
    matches_fingerprint,
    sha256_of,
    short,
)
from vlv_model.checkpoints.hub import HubId
from vlv_model.checkpoints.loading import resolve_model
from vlv_model.checkpoints.sources import Source

NOWHERE = Source(HubId("nobody/nothing"), "unet")


@pytest.fixture
def unet(tiny, tmp_path):
    return Path(shutil.copytree(tiny / "diffusion" / "unet", tmp_path / "unet"))


def test_a_copy_in_another_folder_has_the_same_fingerprint(tiny, unet):
    assert fingerprint(unet) == fingerprint(Source(tiny / "diffusion", "unet"))
    assert is_digest(fingerprint(unet))


def test_settings_and_weights_change_the_fingerprint(unet):
    before = fingerprint(unet)
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps({**config, "norm_num_groups": 8}))
    assert fingerprint(unet) != before


def test_files_that_are_not_opened_do_not_change_it(unet):
    """Other variants of the weights and the library's keys differ between machines."""
    before = fingerprint(unet)
    (unet / "README.md").write_text("notes")
    weights = next(unet.glob("*.safetensors"))
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(half, unet / "diffusion_pytorch_model.fp16.safetensors")
    save_file(half, unet / "model.safetensors.old")
    config = json.loads((unet / "config.json").read_text())
    noted = {"_name_or_path": "elsewhere", "_diffusers_version": "0.1", **config}
    (unet / "config.json").write_text(json.dumps(noted, indent=8))
    assert fingerprint(unet) == before


def test_weights_in_several_files_are_those_of_the_index(tiny, tmp_path):
    model = Path(shutil.copytree(tiny / "language_model", tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    index = {name: file for file, members in shards.items() for name in members}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file({name: tensors[name] for name in shards["a.safetensors"]}, model / "a.safetensors")
    assert fingerprint(model) == str(model)  # half downloaded: its digest is not known yet
    save_file({name: tensors[name] for name in shards["b.safetensors"]}, model / "b.safetensors")
    whole = fingerprint(model)
    assert is_digest(whole)
    save_file(tensors, model / "model.fp16.safetensors")
    assert fingerprint(model) == whole


def test_schedules_and_tokenizers_have_fingerprints(tiny, tmp_path):
    for part, file in (("scheduler", "scheduler_config.json"), ("tokenizer", "tokenizer.json")):
        copy = Path(shutil.copytree(tiny / "diffusion" / part, tmp_path / part))
        before = fingerprint(copy)
        assert is_digest(before)
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**content, "another": 1}))
        assert fingerprint(copy) != before


def test_a_changed_weight_in_a_sample_changes_it(unet):
    weights = next(unet.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    before = fingerprint(unet)
    last = len(data) - SAMPLE_BYTES
    for i in (0, SAMPLES_PER_FILE // 2, SAMPLES_PER_FILE - 1):
        changed = data.copy()
        changed[last * i // (SAMPLES_PER_FILE - 1) + 100] ^= 1
        weights.write_bytes(changed)
        assert fingerprint(unet) != before
    weights.write_bytes(data[:-1])
    assert fingerprint(unet) != before


def test_a_part_not_on_this_machine_has_its_name_which_matches_any_digest(tiny):
    assert fingerprint(NOWHERE) == "nobody/nothing/unet"
    digest = fingerprint(tiny / "florence")
    assert matches_fingerprint(digest, NOWHERE)
    assert matches_fingerprint("nobody/nothing", Source(tiny / "florence"))
    assert matches_fingerprint(digest, Source(tiny / "florence"))
    assert not matches_fingerprint(digest, Source(tiny / "language_model"))


def test_a_digest_of_an_older_version_is_compared_by_its_own_rule(unet):
    """It covers the bytes of config.json and every safetensors file in the folder."""
    digest = hashlib.sha256()
    for path in (unet / "config.json", unet / "diffusion_pytorch_model.safetensors"):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        if path.suffix == ".json":
            digest.update(content)
            continue
        header = 8 + int.from_bytes(content[:8], "little")
        digest.update(content[:header])
        for i in range(SAMPLES_PER_FILE):
            start = max(0, len(content) - SAMPLE_BYTES) * i // (SAMPLES_PER_FILE - 1)
            digest.update(content[start : start + SAMPLE_BYTES])
    before = f"sha256:{digest.hexdigest()}"
    assert is_digest(before)
    assert matches_fingerprint(before, Source(unet))
    assert matches_fingerprint(before, NOWHERE)
    settings = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps({**settings, "another": 1}))
    assert not matches_fingerprint(before, Source(unet))
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    assert matches_fingerprint(before, Source(unet))  # half downloaded: not comparable


def test_names_are_compared_by_repository_and_commit():
    one, other = (Source(HubId("some/model", commit * 40), "vae") for commit in "12")
    assert matches_fingerprint(str(one), one)
    assert matches_fingerprint("some/model/vae", one)
    assert not matches_fingerprint(str(one), other)
    assert not matches_fingerprint("another/model/vae", one)


def test_diffusers_weights_have_another_file_name(unet):
    own = unet / "diffusion_pytorch_model.safetensors"
    shutil.copy(own, unet / "model.safetensors")
    before = fingerprint(unet)
    tensors = load_file(own)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, own)
    assert fingerprint(unet) != before


def test_short_form(unet):
    assert short("sha256:" + "0123456789abcdef" * 4) == "sha256:0123456789ab"
    assert short("nobody/nothing") == "nobody/nothing"


def test_fingerprints_of_parts_by_name(tiny):
    config, _ = resolve_model(tiny)
    assert fingerprint_parts(config, ("vae", "florence")) == {
        "vae": fingerprint(tiny / "diffusion" / "vae"),
        "florence": fingerprint(tiny / "florence"),
    }


def test_sha256_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_of(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
