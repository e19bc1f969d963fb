import json
import subprocess

import pytest
from transformers import AutoTokenizer

from vlv_model.checkpoints.digests import fingerprint_parts
from vlv_model.checkpoints.loading import resolve_model
from vlv_model.tiny import SCENE_WORDS, write_tiny_models

PARTS = ("florence", "vae", "unet", "text_encoder", "language_model")


def test_the_seed_decides_the_weights_also_in_another_process(tiny, forked_python, tmp_path):
    expected = fingerprint_parts(resolve_model(tiny)[0], PARTS)
    program = f"from vlv_model.tiny import write_tiny_models as w; w({str(tmp_path / 'again')!r})"
    subprocess.run([forked_python, "-c", program], check=True, capture_output=True)
    again = tmp_path / "again"
    assert fingerprint_parts(resolve_model(again)[0], PARTS) == expected
    for path in tiny.rglob("tokenizer.json"):
        assert path.read_bytes() == (again / path.relative_to(tiny)).read_bytes()
    other = fingerprint_parts(resolve_model(write_tiny_models(tmp_path / "b", seed=1))[0], PARTS)
    assert all(other[part] != expected[part] for part in PARTS)


def test_the_folder_is_safetensors_only_and_names_no_absolute_path(tiny):
    suffixes = {path.suffix for path in tiny.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    model = json.loads((tiny / "model.json").read_text())
    assert model["florence"] == "florence"
    for path in tiny.rglob("*.json"):
        assert str(tiny) not in path.read_text()


@pytest.mark.parametrize("part", ["florence", "diffusion/tokenizer", "language_model"])
def test_every_scene_word_is_one_token(tiny, part):
    tokenizer = AutoTokenizer.from_pretrained(tiny / part)
    text = " ".join(SCENE_WORDS)
    assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(SCENE_WORDS)
