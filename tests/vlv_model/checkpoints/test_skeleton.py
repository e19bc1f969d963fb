"""Models without weights have the shapes of the loaded ones."""

import json
import shutil
from pathlib import Path

import pytest
from torch import nn

from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints import skeleton
from vlv_model.checkpoints.layouts import read_parts
from vlv_model.checkpoints.sources import resolve_model
from vlv_model.config import Lora, ModelConfig
from vlv_model.errors import ModelError


def shapes(model: nn.Module) -> dict[str, tuple[tuple[int, ...], bool]]:
    return {name: (tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def configurations(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The tiny models' folders with nothing but their configurations."""
    folder = tmp_path_factory.mktemp("configurations")
    for file in tiny_models.rglob("*.json"):
        if file.name in ("config.json", "scheduler_config.json", "model.json"):
            (folder / file.relative_to(tiny_models)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.relative_to(tiny_models))
    return resolve_model(folder)[0]


def test_shapes_are_those_of_the_loaded_models(
    tiny_models: Path, configurations: ModelConfig
) -> None:
    built = skeleton.autoencoder(configurations)
    assert next(built.parameters()).is_meta
    assert shapes(built) == shapes(VLVAutoEncoder.from_pretrained(tiny_models))
    captioner = VLVCaptioner.from_pretrained(tiny_models, for_training=True, lora=Lora(rank=4))
    built = skeleton.captioner(configurations, Lora(rank=4))
    assert shapes(built) == shapes(captioner)


def test_known_ids_need_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = ModelConfig(florence="florence-community/Florence-2-base@main")
    configs = skeleton.read_configs(small, read_parts("stage1", small))
    assert configs["florence"]["text_config"]["d_model"] == 768
    assert configs["unet"]["cross_attention_dim"] == 1024


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("language_model", "Qwen/Qwen2.5-4B", "or one of Qwen/Qwen2.5-"),
        ("language_model", "nobody/nothing", "is neither in the hub's cache nor known here"),
        ("florence", "/nowhere/at/all", "there is no folder '/nowhere/at/all'"),
    ],
)
def test_an_unknown_model_is_one_line(field: str, value: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        skeleton.captioner(ModelConfig(**{field: value}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="says model_type 'llama', expected 'qwen2'"):
        skeleton.captioner(ModelConfig(language_model=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        skeleton.captioner(ModelConfig(language_model=str(tmp_path)))
