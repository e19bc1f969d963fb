"""Extractors against transformers' own classes and processors, and the heads against a closed form."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.tiny_extractors import WIDTH, write_clip, write_dinov2
from vlv_model.errors import CheckpointError, ConfigError, ModelError
from vlv_model.features.extractors import EXTRACTORS, ClipText, load_extractor, pinned
from vlv_model.features.settings import ExtractorConfig, ExtractorName


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> str:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip", tiny_models / "diffusion/tokenizer")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dinov2(tmp_path_factory.mktemp("dino") / "dinov2")


def photos() -> list[Image.Image]:
    """Noise in sizes whose halves do not divide."""
    rng = np.random.default_rng(0)
    sizes = [(53, 75), (90, 41), (33, 33)]
    return [Image.fromarray(rng.integers(0, 256, (*s, 3), np.uint8)) for s in sizes]


def squares(extractor: Any) -> torch.Tensor:
    return torch.from_numpy(np.stack([extractor.square.cut(photo) for photo in photos()]))


def test_every_name_of_the_setting_is_an_extractor() -> None:
    assert set(get_args(ExtractorName)) == set(EXTRACTORS)


def test_clip_images_are_transformers(clip: str) -> None:
    extractor = load_extractor(ExtractorConfig(extractor="clip", weights=clip))
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(photos(), return_tensors="pt")
    expected = CLIPModel.from_pretrained(clip).get_image_features(**pixels).pooler_output
    found = extractor.describe(squares(extractor))["features"]
    assert extractor.width == found.shape[1] == WIDTH
    torch.testing.assert_close(found, expected)


def test_dinov2_is_transformers(dinov2: str) -> None:
    extractor = load_extractor(ExtractorConfig(extractor="dinov2", weights=dinov2))
    pixels = BitImageProcessorPil.from_pretrained(dinov2)(photos(), return_tensors="pt")
    expected = Dinov2Model.from_pretrained(dinov2)(**pixels).last_hidden_state[:, 0]
    assert extractor.square.size == 28
    torch.testing.assert_close(extractor.describe(squares(extractor))["features"], expected)


def test_clip_texts_are_transformers_and_keep_the_end_of_a_long_one(clip: str) -> None:
    extractor = load_extractor(ExtractorConfig(extractor="clip-text", weights=clip))
    texts = ["a red circle", "a square " * 20, ""]
    words = CLIPTokenizer.from_pretrained(clip)
    model = CLIPModel.from_pretrained(clip)
    found = extractor.describe(texts)
    for text, features in zip(texts, found["features"], strict=True):
        # One by one, without padding; the end token stays at the end of what is cut.
        ids = words(text).input_ids
        cut = torch.tensor([[*ids[:19], ids[-1]] if len(ids) > 20 else ids])
        expected = model.get_text_features(cut).pooler_output[0]
        torch.testing.assert_close(features, expected)
    tokens = len(words(texts[1]).input_ids) - 2
    torch.testing.assert_close(found["seen"], torch.tensor([1, 18 / tokens, 1]))


def test_features_of_an_image_do_not_depend_on_its_batch(clip: str) -> None:
    extractor = load_extractor(ExtractorConfig(extractor="clip", weights=clip))
    batch = squares(extractor)
    alone = torch.cat([extractor.describe(one)["features"] for one in batch.split(1)])
    torch.testing.assert_close(extractor.describe(batch)["features"], alone)


def _v2(folder: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A head of five layers, and the single layer that it equals."""
    torch.manual_seed(0)
    tensors, weight, bias = {}, torch.eye(WIDTH), torch.zeros(WIDTH)
    sizes = [WIDTH, 10, 8, 6, 4, 1]
    for layer, inputs, outputs in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        w, b = torch.randn(outputs, inputs), torch.randn(outputs)
        tensors |= {f"layers.{layer}.weight": w, f"layers.{layer}.bias": b}
        weight, bias = w @ weight, w @ bias + b
    torch.save(tensors, folder / "v2.pth")
    return folder / "v2.pth", weight, bias


def test_both_heads_score_normalised_embeddings(clip: str, tmp_path: Path) -> None:
    # Linear layers without an activation are one: x W + b in closed form.
    v2, weight, bias = _v2(tmp_path)
    v1 = tmp_path / "v1.safetensors"
    save_file({"weight": torch.arange(WIDTH).float()[None], "bias": torch.tensor([5.0])}, v1)
    for file, w, b, version in (
        (v2, weight, bias, "v2"),
        (v1, torch.arange(WIDTH).float()[None], torch.tensor([5.0]), "v1"),
    ):
        config = ExtractorConfig(extractor="aesthetic", weights=clip, head=str(file))
        extractor = load_extractor(config)
        found = extractor.describe(squares(extractor))
        embeddings = found["features"].double()
        expected = (embeddings / embeddings.norm(dim=1, keepdim=True)) @ w.double().T + b.double()
        torch.testing.assert_close(
            found["aesthetic"].double(), expected[:, 0], atol=1e-4, rtol=1e-4
        )
        assert extractor.identity["head"].startswith(f"{version} sha256:")


def test_a_wrong_head_is_refused(clip: str, tmp_path: Path) -> None:
    def config(file: Path) -> ExtractorConfig:
        return ExtractorConfig(extractor="aesthetic", weights=clip, head=str(file))

    with pytest.raises(ModelError, match=r"does not exist: expected the file of https://github"):
        load_extractor(config(tmp_path / "none.pth"))
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "large.pth")
    with pytest.raises(ModelError, match=r"takes embeddings of 768 numbers, but .* have 12"):
        load_extractor(config(tmp_path / "large.pth"))
    torch.save({"conv.weight": torch.zeros(1, 12)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="is not an aesthetic head of LAION"):
        load_extractor(config(tmp_path / "other.pth"))
    torch.save({"weight": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        load_extractor(config(tmp_path / "code.pth"))


def test_weights_of_another_model_are_refused(dinov2: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^embed\.weights: '.*' lacks .* tensors|cannot load"):
        load_extractor(ExtractorConfig(extractor="clip", weights=dinov2))
    with pytest.raises(ModelError, match=r"^embed\.weights: there is no folder"):
        load_extractor(ExtractorConfig(extractor="clip", weights=str(tmp_path / "none")))


def test_settings_of_another_extractor_are_refused() -> None:
    from pipelines.cli.config import build

    for values, expected in [
        ({"extractor": "clip", "resize": "clean"}, "embed.resize belongs to embed.extractor=inception"),
        ({"extractor": "inception"}, "needs embed.weights"),
        ({"extractor": "aesthetic"}, "embed.head belong together"),
        ({"extractor": "clip", "head": "x"}, "embed.head belong together"),
        ({"extractor": "inception", "weights": "x", "precision": "bfloat16"}, "float32 alone"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=expected):
            build(ExtractorConfig, values)


def test_the_shape_without_weights_is_that_of_the_model(clip: str, dinov2: str) -> None:
    for name, weights in (("clip", clip), ("dinov2", dinov2), ("clip-text", clip)):
        config = ExtractorConfig.model_validate({"extractor": name, "weights": weights})
        empty, full = EXTRACTORS[name].skeleton(config), load_extractor(config)
        assert next(empty.parameters()).is_meta
        sizes = [[p.numel() for p in m.parameters()] for m in (empty, full)]
        assert sizes[0] == sizes[1]
        assert empty.width == full.width
    assert isinstance(full, ClipText)


def test_hub_ids_and_folders_are_pinned(clip: str) -> None:
    assert pinned(ExtractorConfig(extractor="clip", weights=clip)).weights == clip
    at = f"owner/name@{'a' * 40}"
    assert pinned(ExtractorConfig(extractor="clip", weights=at)).weights == at


def test_published_defaults_have_shapes_without_files() -> None:
    # As published: 304 M of CLIP ViT-L/14's image tower, 124 M of its text tower, DINOv2-L's 304 M.
    for name, millions, width in (
        ("clip", 304.0, 768),
        ("clip-text", 123.7, 768),
        ("dinov2", 304.4, 1024),
    ):
        extractor = EXTRACTORS[name].skeleton(ExtractorConfig.model_validate({"extractor": name}))
        assert sum(p.numel() for p in extractor.parameters()) / 1e6 == pytest.approx(
            millions, abs=0.1
        )
        assert extractor.width == width
    assert extractor.square.size == 224
    assert extractor.square.shorter == 256
