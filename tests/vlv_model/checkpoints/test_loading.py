import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner
from vlv_model.checkpoints.loading import (
    load_caption_tokenizer,
    load_diffusion,
    load_florence,
    load_language_model,
    load_text_encoder,
    resolve_checkpoint,
    resolve_model,
    text_encoder_width,
)
from vlv_model.config import ModelConfig
from vlv_model.encoder import VLVEncoder
from vlv_model.errors import CheckpointError, ModelError
from vlv_model.precision import cast
from vlv_model.tiny import LATENT_CHANNELS


@pytest.fixture
def models(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "models"))


@pytest.fixture
def config(models):
    return resolve_model(models)[0]


def rewrite(path: Path, change) -> None:
    # clones: the file under a mapped tensor must not change
    weights = change({name: tensor.clone() for name, tensor in load_file(path).items()})
    save_file(weights, path, metadata={"format": "pt"})


def message_of(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_paths_in_a_model_folder_are_relative_to_it(models, monkeypatch):
    monkeypatch.chdir(models.parent)
    config, checkpoint = resolve_model("models")
    assert checkpoint is None
    assert config.florence == str(models / "florence")
    assert config.num_queries == 16
    assert resolve_model(config)[0] == config


def test_hub_ids_stay_and_relative_folders_become_absolute(models, monkeypatch):
    monkeypatch.chdir(models)
    config, _ = resolve_model(ModelConfig(florence="florence", vae="diffusion/vae"))
    assert config.florence == str(models / "florence")
    assert config.vae == str(models / "diffusion" / "vae")
    assert config.language_model == "Qwen/Qwen2.5-3B"


def test_diffusion_parts_can_be_given_one_by_one(models, config):
    shutil.move(models / "diffusion" / "vae", models / "another_vae")
    own = config.model_copy(update={"vae": str(models / "another_vae")})
    assert VLVAutoEncoder.from_pretrained(own).latent_shape == (LATENT_CHANNELS, 8, 8)
    with pytest.raises(ModelError, match="vae: there is no folder"):
        load_diffusion(config)


def test_parts_given_by_name_define_a_model_or_override_one(models, monkeypatch):
    monkeypatch.chdir(models)
    named = {
        "florence": "florence",
        "diffusion": models / "diffusion",
        "image_size": 64,
        "encoder_image_size": 128,
    }
    encoder = VLVEncoder.from_pretrained(num_queries=5, **named)
    assert encoder.num_queries == 5
    assert encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 5, 64)
    assert resolve_checkpoint(None, None, named)[0].language_model == "Qwen/Qwen2.5-3B"
    config, _ = resolve_checkpoint(models, None, {"num_queries": 5})
    assert (config.num_queries, config.florence) == (5, str(models / "florence"))
    autoencoder = VLVAutoEncoder.from_pretrained(models, image_size=32)
    assert autoencoder.latent_shape == (LATENT_CHANNELS, 4, 4)
    captioner = VLVCaptioner.from_pretrained(models, for_training=True, num_queries=5)
    assert captioner.encoder.num_queries == 5


def test_a_checkpoint_alone_gives_its_model(models):
    config, _ = resolve_model(models)
    (models / "checkpoint.json").write_text(json.dumps({"model": config.model_dump()}))
    assert resolve_checkpoint(None, models) == (config, models)


@pytest.mark.parametrize("kind", [VLVEncoder, VLVAutoEncoder, VLVCaptioner])
@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"florense": "x"}, "unknown model setting 'florense': did you mean 'florence'"),
        ({"zzz": "x"}, "unknown model setting 'zzz': expected one of florence, "),
        ({"num_queries": 0}, "invalid model settings: num_queries: "),
        ({"num_queries": True}, "invalid model settings: num_queries: "),
        ({"prompt": ""}, "invalid model settings: prompt: "),
        ({"projector_seed": -1}, "invalid model settings: projector_seed: "),
        ({"projector_seed": 2**63}, "invalid model settings: projector_seed: "),
    ],
)
def test_unknown_and_invalid_parts_are_named_in_one_line(tiny, kind, parts, match):
    with pytest.raises(ModelError, match=match) as error:
        kind.from_pretrained(tiny, **parts)
    message_of(error)


WRONG_KINDS = {
    "florence": ("language_model", load_florence, "model_type 'qwen2', expected 'florence2'"),
    "language_model": ("florence", load_language_model, "'florence2', expected 'qwen2'"),
    "text_encoder": ("language_model", load_text_encoder, "'qwen2', expected 'clip_text_model'"),
    "unet": ("diffusion/vae", load_diffusion, "'AutoencoderKL', expected 'UNet2DConditionModel'"),
    "vae": ("diffusion/unet", load_diffusion, "'UNet2DConditionModel', expected 'AutoencoderKL'"),
}


@pytest.mark.parametrize("part", WRONG_KINDS)
def test_a_folder_of_another_kind_is_rejected(models, config, part):
    folder, load, match = WRONG_KINDS[part]
    with pytest.raises(ModelError, match=f"{part}: .*{match}") as error:
        load(config.model_copy(update={part: str(models / folder)}))
    message_of(error)


def test_the_text_encoders_width_is_not_read_from_another_kind(models, config):
    other = config.model_copy(update={"text_encoder": str(models / "language_model")})
    with pytest.raises(ModelError, match=r"text_encoder: .*expected 'clip_text_model'"):
        text_encoder_width(other)


@pytest.mark.parametrize("content", ["{}", "[]", "", "null", '{"model_type": ["qwen2"]}', "\xff"])
@pytest.mark.parametrize("part", ["florence", "language_model", "text_encoder", "vae"])
def test_a_broken_configuration_is_rejected_before_anything_is_built(
    models, config, monkeypatch, part, content
):
    folder = models if part in ("florence", "language_model") else models / "diffusion"
    (folder / part / "config.json").write_bytes(content.encode("latin-1"))
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *args: pytest.fail("a model is built"))
    with pytest.raises(ModelError, match=part) as error:
        WRONG_KINDS[part][1](config)
    message_of(error)


def test_a_folder_without_a_model_is_rejected(tmp_path):
    with pytest.raises(ModelError, match=r"neither checkpoint\.json nor model\.json") as error:
        resolve_model(tmp_path)
    message_of(error)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "model.json"),
        ("[]", "model.json"),
        ('{"florense": "x"}', "florense"),
        ("\xff", "cannot read a model from"),
    ],
)
def test_a_broken_model_file_is_rejected(models, content, named):
    (models / "model.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=named) as error:
        resolve_model(models)
    message_of(error)


def test_a_model_and_another_checkpoint_are_rejected(models, tmp_path):
    content = {"model": resolve_model(models)[0].model_dump()}
    (models / "checkpoint.json").write_text(json.dumps(content))
    assert resolve_checkpoint(models, None)[1] == models
    assert resolve_checkpoint(models, models)[1] == models
    with pytest.raises(CheckpointError, match="two checkpoints"):
        resolve_checkpoint(models, tmp_path)


@pytest.mark.parametrize(
    ("change", "load", "part"),
    [
        ({"florence": "missing"}, load_florence, "florence: there is no folder 'missing'"),
        ({"florence": "./a/b"}, load_florence, "florence: there is no folder"),
        ({"language_model": "nobody/nothing"}, load_language_model, "language_model: cannot load"),
        ({"language_model": "nobody/nothing"}, load_caption_tokenizer, "from the model hub"),
        ({"diffusion": "nobody/nothing"}, load_diffusion, "vae: cannot load 'nobody/nothing/vae'"),
        ({"diffusion": "nobody/nothing"}, load_text_encoder, "text_encoder: cannot load"),
        ({"diffusion": "nobody/nothing"}, text_encoder_width, "text_encoder: cannot load"),
    ],
)
def test_a_missing_part_is_named_in_one_line(config, change, load, part):
    with pytest.raises(ModelError, match=part) as error:
        load(config.model_copy(update=change))
    message_of(error)


@pytest.mark.parametrize(
    ("file", "pickled", "load"),
    [
        ("florence/model.safetensors", "pytorch_model.bin", load_florence),
        ("language_model/model.safetensors", "pytorch_model.bin", load_language_model),
        ("diffusion/text_encoder/model.safetensors", "pytorch_model.bin", load_text_encoder),
        (
            "diffusion/unet/diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model.bin",
            load_diffusion,
        ),
    ],
)
def test_a_pickle_is_not_opened(models, config, file, pickled, load):
    path = models / file
    torch.save(load_file(path), path.with_name(pickled))
    path.unlink()
    with pytest.raises(ModelError, match="cannot load") as error:
        load(config)
    message_of(error)


@pytest.mark.parametrize("part", ["florence", "language_model", "diffusion/text_encoder"])
def test_a_missing_tensor_is_an_error(models, config, part):
    lost: list[str] = []

    def drop_one(weights):
        lost.append(next(name for name in sorted(weights) if "layers.0" in name))
        return {name: tensor for name, tensor in weights.items() if name not in lost}

    rewrite(models / part / "model.safetensors", drop_one)
    load = {"florence": load_florence, "language_model": load_language_model}
    with pytest.raises(ModelError, match="lacks 1 tensors") as error:
        load.get(part, load_text_encoder)(config)
    assert lost[0].split("layers.0")[1] in message_of(error)


def test_a_missing_diffusion_tensor_is_an_error(models, config):
    rewrite(
        models / "diffusion" / "unet" / "diffusion_pytorch_model.safetensors",
        lambda weights: {n: t for n, t in weights.items() if n != "conv_out.bias"},
    )
    with pytest.raises(ModelError, match=r"unet: .*conv_out\.bias"):
        load_diffusion(config)


def test_florence_in_microsofts_layout_is_an_error_that_says_how_to_convert_it(
    models, config, capfd
):
    path = models / "florence" / "config.json"
    content = json.loads(path.read_text())
    vision = content["vision_config"]
    for ours, theirs in (("embed_dim", "dim_embed"), ("model_type", "davit")):
        vision[theirs] = vision.pop(ours, None)
    content["auto_map"] = {"AutoModelForCausalLM": "modeling_florence2.Florence2"}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="is in Microsoft's own layout") as error:
        load_florence(config)
    assert "florence-community/Florence-2-large" in message_of(error)
    assert f"--hf_model_id {models / 'florence'} " in message_of(error)
    assert capfd.readouterr() == ("", "")


def test_tensor_names_of_another_layout_are_one_line(models, config, capfd):
    rewrite(
        models / "florence" / "model.safetensors",
        lambda weights: {f"other.{name}": tensor for name, tensor in weights.items()},
    )
    with pytest.raises(ModelError, match=r"lacks .* tensors") as error:
        load_florence(config)
    message_of(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("load", [load_florence, load_text_encoder, load_language_model])
def test_bfloat16_rounds_weights_and_not_buffers(config, load):
    def loaded(precision):
        found = load(config, precision)
        return found[0] if isinstance(found, tuple) else found

    exact, low = loaded("float32"), loaded("bfloat16")
    for ours, theirs in zip(low.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())
    tables = dict(exact.named_buffers())
    for name, table in low.named_buffers():
        assert table.dtype == tables[name].dtype
        assert torch.equal(table, tables[name])


def test_loading_in_bfloat16_equals_casting(config):
    for kind in (VLVAutoEncoder, VLVCaptioner):
        given = {"for_training": True} if kind is VLVCaptioner else {}
        low = kind.from_pretrained(config, precision="bfloat16", **given).state_dict()
        exact = cast(kind.from_pretrained(config, **given), "bfloat16").state_dict()
        assert low.keys() == exact.keys()
        for name, tensor in low.items():
            assert tensor.dtype == exact[name].dtype, name
            assert torch.equal(tensor, exact[name]), name


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99])
def test_a_damaged_file_is_named(models, config, damage):
    path = models / "language_model" / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match="language_model: cannot load") as error:
        load_language_model(config)
    message_of(error)


def test_another_shape_is_rejected(models, config):
    rewrite(
        models / "language_model" / "model.safetensors",
        lambda weights: {n: t.repeat(2, *[1] * (t.dim() - 1)) for n, t in weights.items()},
    )
    with pytest.raises(ModelError, match="language_model: cannot load") as error:
        load_language_model(config)
    message_of(error)


@pytest.mark.parametrize(
    ("part", "load"),
    [
        ("florence", load_florence),
        ("diffusion/tokenizer", load_text_encoder),
        ("language_model", load_caption_tokenizer),
    ],
)
def test_a_tokenizer_without_its_vocabulary_is_rejected(models, config, part, load):
    (models / part / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=part.split("/")[-1]) as error:
        load(config)
    message_of(error)


def test_a_published_tokenizer_of_vocabulary_and_merges_is_read(models, config):
    """Stable Diffusion's tokenizer has vocab.json and merges.txt, and no tokenizer.json."""
    folder = models / "diffusion" / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    text = "a large red circle, 3 stars"
    expected = load_text_encoder(config)[1](text).input_ids
    (folder / "tokenizer.json").unlink()
    assert load_text_encoder(config)[1](text).input_ids == expected


def test_weights_published_in_bfloat16_are_loaded_in_float32(models, config):
    load_language_model(config).to(torch.bfloat16).save_pretrained(models / "language_model")
    assert {p.dtype for p in load_language_model(config).parameters()} == {torch.float32}


def test_the_published_layout_of_the_text_encoder_is_read(models, config):
    """On the hub, Stable Diffusion's text encoder has the prefix `text_model.`."""
    path = models / "diffusion" / "text_encoder" / "model.safetensors"
    expected, _ = load_text_encoder(config)
    rewrite(
        path,
        lambda weights: {
            f"text_model.{n.removeprefix('text_model.')}": t for n, t in weights.items()
        },
    )
    clip, _ = load_text_encoder(config)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(clip.state_dict()[name], tensor)


SHARDED = {
    "florence": ("florence", load_florence),
    "language_model": ("language_model", load_language_model),
    "text_encoder": ("diffusion/text_encoder", load_text_encoder),
    "unet": ("diffusion/unet", load_diffusion),
}


@pytest.mark.parametrize("part", SHARDED)
def test_weights_in_shards_are_read_through_their_index(models, config, part):
    """Large models are published in shards: Qwen2.5-3B in two."""
    folder, load = SHARDED[part]

    def loaded():
        found = load(config)
        found = found[1] if part == "unet" else found[0] if isinstance(found, tuple) else found
        return found.state_dict()

    expected = loaded()
    (whole,) = (models / folder).glob("*.safetensors")
    weights = {name: tensor.clone() for name, tensor in load_file(whole).items()}
    names = sorted(weights)
    stem = whole.name.removesuffix(".safetensors")
    shards = {f"{stem}-{i:05}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, inside in shards.items():
        save_file(
            {n: weights[n] for n in inside}, models / folder / file, metadata={"format": "pt"}
        )
    index = {
        "metadata": {"total_size": whole.stat().st_size},
        "weight_map": {name: file for file, inside in shards.items() for name in inside},
    }
    (models / folder / f"{whole.name}.index.json").write_text(json.dumps(index))
    whole.unlink()
    found = loaded()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (models / folder / max(shards)).unlink()
    with pytest.raises(ModelError, match=f"{part}: ") as error:
        load(config)
    message_of(error)
