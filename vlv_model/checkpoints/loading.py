"""Loads pretrained parts strictly, from safetensors only, in a given precision.

Pickles are rejected since they can run code. A tensor missing from the file is an error, since
it would silently stay random. Weights are converted to the requested precision: Qwen2.5 is published
in bfloat16, in which updates at a learning rate of 1e-5 round to zero. Large parts are loaded
directly in their precision: eight ranks that first load 3B parameters in float32 run out of memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import enable_progress_bars
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Florence2Model,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from vlv_model.checkpoints.layouts import SD, SD3, Layout, layout_of
from vlv_model.checkpoints.parts import check_kind
from vlv_model.checkpoints.sources import (
    Model,
    Source,
    part_source,
    resolve_checkpoint,
    resolve_model,
)
from vlv_model.clip_pair import ClipPair, SD3TextEncoders, SDXLTextEncoders
from vlv_model.config import ModelConfig, Precision
from vlv_model.errors import ModelError, one_line
from vlv_model.latents import LatentFormat
from vlv_model.precision import cast, dtype_of
from vlv_model.text_encoder import TextEncoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from vlv_model.diffusion_decoder import DiffusionDecoder

__all__ = [
    "Model",
    "build_decoder",
    "build_text_encoders",
    "caption_widths",
    "denoiser_classes",
    "load_caption_tokenizer",
    "load_decoder",
    "load_denoiser",
    "load_diffusion",
    "load_florence",
    "load_language_model",
    "load_text_encoder",
    "load_text_encoders",
    "load_vae",
    "load_weights",
    "named_errors",
    "num_positions",
    "quietly",
    "read_latent_format",
    "resolve_checkpoint",
    "resolve_model",
    "text_encoder_classes",
    "text_encoder_width",
]


def load_florence(
    config: ModelConfig, precision: Precision = "float32"
) -> tuple[Florence2Model, PreTrainedTokenizerBase]:
    """Florence-2 without its language-modelling head, and its tokenizer."""
    source = part_source(config, "florence")
    # Load in float32, then cast: the library would also round a buffer of positions.
    model = cast(_load_transformer(config, "florence", Florence2Model), precision)
    load = partial(AutoTokenizer.from_pretrained, source.name, **source.load_kwargs)
    tokenizer = named_errors("florence", source, load)
    _check_vocabulary("florence", source, tokenizer, model.config.text_config.vocab_size)
    return model, tokenizer


def load_text_encoder(
    config: ModelConfig, precision: Precision = "float32", *, second: bool = False
) -> tuple[Any, CLIPTokenizer]:
    """A CLIP text encoder of the diffusion model, with its projection if it has one, and tokenizer."""
    suffix = "_2" if second else ""
    part, named = f"text_encoder{suffix}", f"tokenizer{suffix}"
    source = part_source(config, named)
    load = partial(CLIPTokenizer.from_pretrained, source.name, **source.load_kwargs)
    tokenizer = named_errors(named, source, load)
    kind = text_encoder_classes(layout_of(config))[part]
    model = _load_transformer(config, part, kind, precision)
    _check_vocabulary(named, source, tokenizer, model.config.vocab_size)
    return model, tokenizer


def load_text_encoders(
    config: ModelConfig, precision: Precision = "float32"
) -> TextEncoder | ClipPair:
    """The text encoders of the diffusion model that `config` names."""
    layout = layout_of(config)
    loaded = [load_text_encoder(config, precision)]
    if len(layout.text_encoders) > 1:
        loaded.append(load_text_encoder(config, precision, second=True))
    clips, tokenizers = zip(*loaded, strict=True)
    return build_text_encoders(config, layout, clips, tokenizers)


def build_text_encoders(
    config: ModelConfig, layout: Layout, clips: Sequence[Any], tokenizers: Sequence[Any]
) -> TextEncoder | ClipPair:
    """The module of a layout around its text encoders."""
    settings: Any = {"bottleneck": config.bottleneck, "special_tokens": config.special_tokens}
    if layout == SD:
        return TextEncoder(clips[0], tokenizers[0], **settings)
    kind = SD3TextEncoders if layout == SD3 else SDXLTextEncoders
    return kind(clips[0], clips[1], (tokenizers[0], tokenizers[1]), **settings)


def text_encoder_classes(layout: Layout) -> dict[str, Any]:
    """The class of each text encoder: SDXL does not use the projection of its first."""
    projected = dict.fromkeys(layout.text_encoders, CLIPTextModelWithProjection)
    return projected if layout == SD3 else {**projected, "text_encoder": CLIPTextModel}


def caption_widths(config: ModelConfig) -> tuple[int, ...]:
    """Widths that the caption projectors must give, from the text encoders' configurations."""
    return tuple(text_encoder_width(config, part) for part in layout_of(config).text_encoders)


def text_encoder_width(config: ModelConfig, part: str = "text_encoder") -> int:
    """Width of a text encoder's embeddings, from its configuration."""
    source = part_source(config, part)
    _check_kind(part, source)
    load = partial(CLIPTextConfig.from_pretrained, source.name, **source.load_kwargs)
    return named_errors(part, source, load).hidden_size


def load_diffusion(config: ModelConfig) -> tuple[AutoencoderKL, Any, Any]:
    """VAE, denoiser and noise schedule."""
    return load_vae(config), *load_denoiser(config)


def load_decoder(
    config: ModelConfig, precision: Precision = "float32", *, with_vae: bool = True
) -> DiffusionDecoder:
    """The diffusion decoder that `config` names; without the VAE it has the format of its latents."""
    vae = load_vae(config, precision) if with_vae else read_latent_format(config)
    return build_decoder(config, layout_of(config), vae, *load_denoiser(config, precision))


def build_decoder(
    config: ModelConfig, layout: Layout, vae: Any, denoiser: Any, schedule: Any
) -> DiffusionDecoder:
    """The module of a layout around its parts."""
    from vlv_model.diffusion_decoder import DiffusionDecoder
    from vlv_model.sd3 import SD3Decoder
    from vlv_model.sdxl import SDXLDecoder

    kinds = {"sd": DiffusionDecoder, "sdxl": SDXLDecoder, "sd3": SD3Decoder}
    decoder = kinds[layout.name](vae, denoiser, schedule, image_size=config.image_size)
    if isinstance(decoder, SD3Decoder):
        decoder.time_shift = config.time_shift
    return decoder


def denoiser_classes(layout: Layout) -> tuple[Any, Any]:
    """The classes of a layout's denoiser and of its schedule, whichever sampler was published."""
    from diffusers import (
        DDPMScheduler,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        UNet2DConditionModel,
    )

    if layout == SD3:
        return SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler
    return UNet2DConditionModel, DDPMScheduler


def load_vae(config: ModelConfig, precision: Precision = "float32") -> AutoencoderKL:
    """The VAE."""
    from diffusers import AutoencoderKL  # a slow import that a captioner does not need

    return _load_diffuser(config, "vae", AutoencoderKL, precision)


def read_latent_format(config: ModelConfig) -> LatentFormat:
    """Shape and scale of the VAE's latents, from its configuration."""
    from diffusers import AutoencoderKL

    source = part_source(config, "vae")
    _check_kind("vae", source)
    load = partial(AutoencoderKL.load_config, source.name, **source.load_kwargs)
    return LatentFormat.of(named_errors("vae", source, load))


def load_denoiser(config: ModelConfig, precision: Precision = "float32") -> tuple[Any, Any]:
    """The UNet or transformer, and the noise schedule."""
    layout = layout_of(config)
    kind, schedule = denoiser_classes(layout)
    denoiser = _load_diffuser(config, layout.denoiser, kind, precision)
    source = part_source(config, "scheduler")
    load = partial(schedule.load_config, source.name, **source.load_kwargs)
    return denoiser, schedule.from_config(named_errors("scheduler", source, load))


def load_language_model(config: ModelConfig, precision: Precision = "float32") -> Qwen2ForCausalLM:
    """The caption decoder."""
    return _load_transformer(config, "language_model", Qwen2ForCausalLM, precision)


def num_positions(config: ModelConfig) -> int:
    """Positions that the caption decoder has for a prefix and its caption, from its configuration."""
    source = part_source(config, "language_model")
    _check_kind("language_model", source)
    load = partial(Qwen2Config.from_pretrained, source.name, **source.load_kwargs)
    return named_errors("language_model", source, load).max_position_embeddings


def load_caption_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The caption decoder's tokenizer, without the weights (for data workers).

    Uses the generic class, which reads tokenizer.json as published. The class that transformers
    infers from the model type rebuilds it with a normaliser that the published one may lack.
    """
    config, _ = resolve_model(model)
    source = part_source(config, "language_model")
    load = partial(PreTrainedTokenizerFast.from_pretrained, source.name, **source.load_kwargs)
    return named_errors("language_model", source, load)


@contextmanager
def quietly() -> Iterator[None]:
    """Silence transformers' loading bars and its warnings about tensor names, checked here instead.

    Progress bars of downloads from the hub stay.
    """
    were_shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if were_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if were_shown:
            transformers_logging.enable_progress_bar()


def _load_transformer(
    config: ModelConfig, part: str, kind: Any, precision: Precision = "float32"
) -> Any:
    source = part_source(config, part)
    _check_kind(part, source)
    return load_weights(part, source, kind, dtype=dtype_of(precision))


def _load_diffuser(config: ModelConfig, part: str, kind: Any, precision: Precision) -> Any:
    source = part_source(config, part)
    _check_kind(part, source)
    return load_weights(part, source, kind, torch_dtype=dtype_of(precision))


def load_weights(part: str, source: Source, kind: Any, **dtype: torch.dtype) -> Any:
    """A part with its weights. `dtype` is the libraries' keyword: `dtype` or `torch_dtype`.

    Raises ModelError, which begins with `part`, unless all tensors of the class `kind` are there.
    """
    with quietly():
        model, report = named_errors(
            part,
            source,
            lambda: kind.from_pretrained(
                source.name,
                use_safetensors=True,
                output_loading_info=True,
                **source.load_kwargs,
                **dtype,
            ),
        )
    _check_complete(part, source, sorted(report["missing_keys"]))
    return model


def _check_kind(part: str, source: Source) -> None:
    def read() -> Any:
        path = cached_file(source.name, "config.json", **source.load_kwargs)
        return json.loads(Path(path).read_text(encoding="utf-8"))

    check_kind(part, source, named_errors(part, source, read))


def _check_complete(part: str, source: Source, missing: list[str]) -> None:
    if missing:
        raise ModelError(
            f"{part}: '{source}' lacks {len(missing)} tensors of the model, such as "
            f"{', '.join(missing[:3])}: use weights in the layout of transformers' own classes"
        )


def _check_vocabulary(
    part: str, source: Source, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    # Without its vocabulary files a tokenizer may load without an error, with only a few special
    # tokens. All tokenizers here are byte-level: they have at least one token per byte.
    if not 256 <= len(tokenizer) <= vocab_size:
        raise ModelError(
            f"{part}: the tokenizer of '{source}' has {len(tokenizer)} tokens, expected 256 to the "
            f"{vocab_size}, the model's vocabulary: check that its vocabulary files exist and belong "
            "to this model"
        )


def named_errors(part: str, source: Source, load: Callable[[], Any]) -> Any:
    """What `load` returns; its errors become a ModelError that names part and source."""
    try:
        return load()
    # transformers and diffusers raise these for missing files, an unreachable hub, broken
    # configurations and wrong shapes.
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as problem:
        where = ", which is not a local folder, from the model hub" if source.repo else ""
        raise ModelError(
            f"{part}: cannot load '{source}'{where}; expected a pretrained folder with safetensors "
            f"weights or a reachable hub id: {one_line(problem)}"
        ) from problem
