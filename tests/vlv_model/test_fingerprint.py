import hashlib
import shutil
from pathlib import Path

import pytest

from vlv_model.fingerprint import (
    SAMPLE_BYTES,
    SAMPLES_PER_FILE,
    fingerprint,
    fingerprint_parts,
    same_fingerprint,
    sha256_of,
)
from vlv_model.loading import resolve_model


@pytest.fixture
def unet(tiny, tmp_path):
    return Path(shutil.copytree(tiny / "diffusion" / "unet", tmp_path / "unet"))


def test_a_copy_elsewhere_has_the_same_fingerprint(tiny, unet):
    assert fingerprint(unet) == fingerprint(tiny / "diffusion", "unet")
    assert fingerprint(unet).startswith("sha256:")


def test_config_and_weights_count_and_other_files_do_not(unet):
    before = fingerprint(unet)
    (unet / "README.md").write_text("notes")
    assert fingerprint(unet) == before
    config = unet / "config.json"
    config.write_text(config.read_text() + "\n")
    assert fingerprint(unet) != before


def test_a_changed_weight_is_seen_where_it_is_sampled(unet):
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


def test_an_uncached_hub_id_stands_for_itself_and_says_nothing(tiny):
    assert fingerprint("nobody/nothing", "unet") == "nobody/nothing/unet"
    digest = fingerprint(tiny / "florence")
    assert same_fingerprint(digest, "nobody/nothing")
    assert same_fingerprint(digest, digest)
    assert not same_fingerprint(digest, fingerprint(tiny / "language_model"))


def test_parts_are_listed_by_name(tiny):
    config, _ = resolve_model(tiny)
    assert fingerprint_parts(config, ("vae", "florence")) == {
        "vae": fingerprint(tiny / "diffusion" / "vae"),
        "florence": fingerprint(tiny / "florence"),
    }


def test_sha256_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_of(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
