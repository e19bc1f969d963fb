"""Extractors: a frozen model, and how an image or a caption enters it.

A further one is a class: name its model's class and read the features off its output.

    class Siglip(ImageExtractor):
        default = "google/siglip-base-patch16-224"
        kind, config = SiglipVisionModel, SiglipVisionConfig

        def features(self, pixels):
            return self.model(pixel_values=pixels).pooler_output

and a line in EXTRACTORS (and in `vlv_model.features.settings.ExtractorName`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)
from transformers.utils import cached_file

from vlv_model.checkpoints.digests import fingerprint
from vlv_model.checkpoints.hub import HubId
from vlv_model.checkpoints.loading import load_weights, named_errors
from vlv_model.checkpoints.published import FEATURES_BY_REPO
from vlv_model.checkpoints.sources import Source, source_of
from vlv_model.errors import ModelError
from vlv_model.features.aesthetic import AestheticHead, load_head
from vlv_model.features.inception import (
    WIDTH,
    InceptionV3,
    inception_pixels,
    load_inception,
)
from vlv_model.features.settings import ExtractorConfig
from vlv_model.freezing import freeze
from vlv_model.precision import cast, dtype_of
from vlv_model.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vlv_model.squares import Square

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_WEIGHTS = "embed.weights"
C = TypeVar("C", bound=ExtractorConfig)


class Extractor(nn.Module):
    """A frozen model that makes features of a batch."""

    takes_text: ClassVar[bool] = False
    scores: ClassVar[tuple[str, ...]] = ()
    """Columns beside the features, one number a row."""

    model: nn.Module
    width: int
    """Numbers of a row's features."""
    identity: Mapping[str, Any]
    """What decides the features besides the settings: digests, how a square is cut."""

    @classmethod
    def load(cls, config: ExtractorConfig) -> Extractor:
        """The extractor with its weights. Raises ModelError if they are missing or of another kind."""
        raise NotImplementedError

    @classmethod
    def skeleton(cls, config: ExtractorConfig) -> Extractor:
        """The extractor without weights, on the meta device, for estimates."""
        raise NotImplementedError

    def describe(self, batch: Any) -> dict[str, Tensor]:
        """`features` float32 `[b d]` of a batch, and its scores `[b]` by name."""
        raise NotImplementedError


class ImageExtractor(Extractor):
    """Of images, by a model of transformers, prepared as its preprocessor_config.json says.

    Without this file, its constants are those of the class.
    """

    default: ClassVar[str]
    kind: ClassVar[Any]
    config: ClassVar[Any]
    mean: ClassVar[Sequence[float]] = IMAGENET_MEAN
    std: ClassVar[Sequence[float]] = IMAGENET_STD
    crop: ClassVar[int | None] = None  # None: the side for which the model has positions
    shorter: ClassVar[int | None] = None  # None: the side of the crop

    def __init__(self, model: nn.Module, width: int, preparation: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.width = model, width
        self.square = Square(
            preparation["size"],
            resampling=preparation["resampling"],
            shorter=preparation["shorter"],
        )
        self.identity = {"preprocess": dict(preparation)}
        for name in ("mean", "std"):
            values = torch.tensor(preparation[name]).view(1, 3, 1, 1)
            self.register_buffer(f"_{name}", values, persistent=False)

    def features(self, pixels: Tensor) -> Tensor:
        """float `[b 3 s s]`, normalised -> `[b d]`."""
        raise NotImplementedError

    def describe(self, batch: Tensor) -> dict[str, Tensor]:
        """Of squares, uint8 `[b 3 s s]`."""
        pixels = (batch.float().div_(255) - self._mean) / self._std
        features = self.features(pixels.to(next(self.model.parameters()).dtype))
        return {"features": features.float()}

    @classmethod
    def width_of(cls, config: Any) -> int:
        """Numbers of an image's features, from the model's configuration."""
        return int(config.hidden_size)

    @classmethod
    def load(cls, config: ExtractorConfig) -> ImageExtractor:
        source = weights_source(cls, config)
        model = load_weights(_WEIGHTS, source, cls.kind, dtype=dtype_of(config.precision))
        made = cls(
            freeze(model), cls.width_of(model.config), cls._preparation(source, model.config)
        )
        made.identity = {**made.identity, "weights": fingerprint(source)}
        return made

    @classmethod
    def skeleton(cls, config: ExtractorConfig) -> ImageExtractor:
        source = weights_source(cls, config)
        shape = _shape(source, cls.config, "vision_config")
        with torch.device("meta"):
            model = cast(cls.kind(shape), config.precision).eval()
            return cls(model, cls.width_of(shape), cls._preparation(source, shape))

    @classmethod
    def _preparation(cls, source: Source, shape: Any) -> dict[str, Any]:
        given = _read_json(source, "preprocessor_config.json")
        size = _side(given.get("crop_size"), "height") or cls.crop or int(shape.image_size)
        shorter = _side(given.get("size"), "shortest_edge") or cls.shorter or size
        if shorter < size:
            raise ModelError(
                f"{_WEIGHTS}: preprocessor_config.json of '{source}' resizes the shorter side to {shorter} "
                f"pixels and crops {size}: expected at least as many as it crops"
            )
        return {
            "size": size,
            "shorter": shorter,
            "resampling": "bilinear" if given.get("resample") == 2 else "bicubic",
            "mean": list(given.get("image_mean", cls.mean)),
            "std": list(given.get("image_std", cls.std)),
        }


class Clip(ImageExtractor):
    """CLIP's image embedding after its projection, not normalised."""

    default = "openai/clip-vit-large-patch14"
    kind, config = CLIPVisionModelWithProjection, CLIPVisionConfig
    mean, std = CLIP_MEAN, CLIP_STD

    @classmethod
    def width_of(cls, config: Any) -> int:
        return int(config.projection_dim)

    def features(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.model(pixel_values=pixels).image_embeds
        return embeddings


class Dinov2(ImageExtractor):
    """DINOv2's class token after the last norm."""

    default = "facebook/dinov2-large"
    kind, config = Dinov2Model, Dinov2Config
    crop, shorter = (
        224,
        256,
    )  # its positions are for 518 pixels, the published preparation crops fewer

    def features(self, pixels: Tensor) -> Tensor:
        pooled: Tensor = self.model(pixel_values=pixels).pooler_output
        return pooled


class Aesthetic(Clip):
    """CLIP's image embedding, and LAION's aesthetic score of it."""

    scores = ("aesthetic",)
    head: AestheticHead

    @classmethod
    def load(cls, config: ExtractorConfig) -> ImageExtractor:
        made = super().load(config)
        assert isinstance(made, Aesthetic)
        head, digest = load_head(str(config.head))
        made.head = freeze(head)
        if head.width != made.width:
            raise ModelError(
                f"embed.head={config.head} takes embeddings of {head.width} numbers, but those of "
                f"embed.weights have {made.width}: LAION's heads belong to openai/clip-vit-large-patch14"
            )
        made.identity = {**made.identity, "head": f"{head.version} sha256:{digest}"}
        return made

    def describe(self, batch: Tensor) -> dict[str, Tensor]:
        described = super().describe(batch)
        if hasattr(self, "head"):  # a skeleton has none: nothing beside the tower
            described["aesthetic"] = self.head(described["features"])
        return described


class Inception(Extractor):
    """The last average pool of FID's Inception v3."""

    width = WIDTH

    def __init__(self, model: InceptionV3, config: ExtractorConfig) -> None:
        super().__init__()
        self.model, self.resize = model, config.resize
        self.square = Square(
            config.image_size, framing=config.framing, resampling=config.resampling
        )
        self.identity = {
            name: getattr(config, name)
            for name in ("image_size", "framing", "resampling", "resize")
        }

    def describe(self, batch: Tensor) -> dict[str, Tensor]:
        """Of squares, uint8 `[b 3 s s]`."""
        return {"features": self.model(inception_pixels(batch, self.resize))}

    @classmethod
    def load(cls, config: ExtractorConfig) -> Inception:
        network, digest = load_inception(str(config.weights))
        made = cls(freeze(network), config)
        made.identity = {**made.identity, "weights": f"sha256:{digest}"}
        return made

    @classmethod
    def skeleton(cls, config: ExtractorConfig) -> Inception:
        with torch.device("meta"):
            return cls(InceptionV3().eval(), config)


class ClipText(Extractor):
    """CLIP's text embedding after its projection, not normalised.

    The tokenizer cuts a longer caption and keeps the end token, at which CLIP pools. `seen` is the
    share of a caption's tokens that fit into the window.
    """

    takes_text = True
    scores = ("seen",)
    default = Clip.default

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        config: Any = model.config
        self.width, self.window = int(config.projection_dim), int(config.max_position_embeddings)
        self.identity = {"window": self.window}

    @classmethod
    def load(cls, config: ExtractorConfig) -> ClipText:
        source = weights_source(cls, config)
        kind, dtype = CLIPTextModelWithProjection, dtype_of(config.precision)
        model = load_weights(_WEIGHTS, source, kind, dtype=dtype)
        load = partial(CLIPTokenizer.from_pretrained, source.name, **source.load_kwargs)
        made = cls(freeze(model), named_errors(_WEIGHTS, source, load))
        made.identity = {**made.identity, "weights": fingerprint(source)}
        return made

    @classmethod
    def skeleton(cls, config: ExtractorConfig) -> ClipText:
        source = weights_source(cls, config)
        shape = _shape(source, CLIPTextConfig, "text_config")
        with torch.device("meta"):
            return cls(cast(CLIPTextModelWithProjection(shape), config.precision).eval(), None)

    def describe(self, batch: Sequence[str]) -> dict[str, Tensor]:
        """Of texts."""
        device = next(self.model.parameters()).device
        whole = self.tokenizer(list(batch), verbose=False).input_ids
        cut = self.tokenizer(
            list(batch), padding=True, truncation=True, max_length=self.window, return_tensors="pt"
        ).to(device)
        ends = 2  # the start and the end token are not the caption's
        seen = [(min(len(ids), self.window) - ends) / max(1, len(ids) - ends) for ids in whole]
        return {
            "features": self.embed(cut.input_ids, cut.attention_mask),
            "seen": torch.tensor(
                [s if len(ids) > ends else 1 for s, ids in zip(seen, whole, strict=True)]
            ),
        }

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and attention mask `[b n]` -> float32 `[b d]`."""
        embeddings: Tensor = self.model(input_ids=ids, attention_mask=mask).text_embeds
        return embeddings.float()


EXTRACTORS: dict[str, type[Extractor]] = {
    "clip": Clip,
    "clip-text": ClipText,
    "dinov2": Dinov2,
    "inception": Inception,
    "aesthetic": Aesthetic,
}


def load_extractor(config: ExtractorConfig) -> Extractor:
    """The extractor of the settings with its weights, frozen, on the CPU."""
    return EXTRACTORS[config.extractor].load(config).eval()


def pinned(config: C) -> C:
    """`config` with absolute paths, hub ids at one commit, and the default weights by their name.

    So all processes of a job read the same files. Raises ModelError when neither the hub nor the local
    cache has an id.
    """
    kind, paths = EXTRACTORS[config.extractor], {}
    for name in ("weights", "head"):
        path = Path(getattr(config, name) or "none").expanduser()
        if path.exists():
            paths[name] = str(path.absolute())
    config = config.model_copy(update=paths)
    if kind is Inception:
        return config
    location = weights_source(kind, config).location
    if not isinstance(location, HubId):
        return config
    try:
        return config.model_copy(update={"weights": str(location.pinned())})
    except ModelError as problem:
        raise ModelError(f"{_WEIGHTS}: {problem}") from problem


def weights_source(kind: Any, config: ExtractorConfig) -> Source:
    """Where an extractor's weights are; ModelError if that is no folder and no hub id."""
    return source_of(config.weights or kind.default, _WEIGHTS, _WEIGHTS)


def _shape(source: Source, kind: Any, section: str) -> Any:
    """A model's configuration; of a published one without its files and a network, too."""
    published = FEATURES_BY_REPO.get(source.repo or "", {})
    if published and source.folder() is None:
        return kind.from_dict(dict(published.get(section, published)))
    load = partial(kind.from_pretrained, source.name, **source.load_kwargs)
    return named_errors(_WEIGHTS, source, load)


def _read_json(source: Source, name: str) -> dict[str, Any]:
    """A file of JSON of a pretrained folder or repository; empty if it has none."""
    try:
        path = cached_file(source.name, name, **source.load_kwargs)
    except OSError:
        return {}
    try:
        return dict(json.loads(Path(str(path)).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as problem:
        raise ModelError(f"{_WEIGHTS}: {name} of '{source}' is no JSON object") from problem


def _side(given: Any, name: str) -> int | None:
    """A length in pixels, which older files give as a number."""
    value = given.get(name) if isinstance(given, dict) else given
    return int(value) if isinstance(value, int) else None
