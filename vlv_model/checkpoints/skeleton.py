"""Models without weights, for estimates: the same classes and shapes, on the meta device.

A part's configuration is its config.json: in a local folder (which needs no weights), in the local
cache of the hub, or the published one of an id that the recipes name. No network is used.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    Florence2Config,
    Florence2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlv_model.captioner import VLVCaptioner, build_language_projector
from vlv_model.checkpoints.layouts import layout_of, read_parts
from vlv_model.checkpoints.loading import (
    build_decoder,
    build_text_encoders,
    denoiser_classes,
    text_encoder_classes,
)
from vlv_model.checkpoints.parts import CONFIG_FILES, find_config
from vlv_model.checkpoints.published import BY_REPO
from vlv_model.checkpoints.sources import Source, part_source
from vlv_model.clip_pair import ClipPair
from vlv_model.config import Lora, ModelConfig
from vlv_model.encoder import VLVEncoder
from vlv_model.errors import ModelError
from vlv_model.squares import Square
from vlv_model.text_encoder import TextEncoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from vlv_model.autoencoder import VLVAutoEncoder

_TOKENIZERS = ("tokenizer", "tokenizer_2")
META = torch.device("meta")
Configs = Mapping[str, Mapping[str, Any]]
_TOKENS_PER_WORD = 1.3  # of the published tokenizers, in a prompt: 13 tokens for ten words


def read_configs(model: ModelConfig, parts: tuple[str, ...]) -> Configs:
    """The configurations of `parts`, by part. Raises ModelError for one that is not known here."""
    return {
        part: _read(part, part_source(model, part)) for part in parts if part not in _TOKENIZERS
    }


def autoencoder(model: ModelConfig, *, with_vae: bool = True) -> VLVAutoEncoder:
    """Stage 1's model without weights, float32, on the meta device."""
    configs = read_configs(model, read_parts("stage1", model, local=True))
    return build_autoencoder(model, configs, prompt_tokenizer(model), META, with_vae=with_vae)


def captioner(model: ModelConfig, lora: Lora | None = None) -> VLVCaptioner:
    """Stage 2's model without weights, float32, on the meta device; with adapters if `lora` has a rank."""
    configs = read_configs(model, read_parts("stage2", model, local=True))
    built = build_captioner(model, configs, prompt_tokenizer(model), META)
    if lora and lora.rank:
        with META:
            built.add_adapters(lora, seed=0)
    return built


def vae(model: ModelConfig) -> AutoencoderKL:
    """The VAE without weights, float32, on the meta device."""
    from diffusers import AutoencoderKL

    with META:
        return AutoencoderKL.from_config(dict(_read("vae", part_source(model, "vae"))))


def num_parameters(model: nn.Module) -> int:
    """The number of a model's parameters, trained and frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def build_autoencoder(
    model: ModelConfig,
    configs: Configs,
    tokenizer: Any,
    device: torch.device,
    *,
    with_vae: bool = True,
) -> VLVAutoEncoder:
    """An auto-encoder with random weights; `configs` of all parts, Florence-2's `tokenizer`."""
    from diffusers import AutoencoderKL

    from vlv_model.autoencoder import VLVAutoEncoder
    from vlv_model.latents import LatentFormat

    encoder = _encoder(model, configs, tokenizer, device)
    vae_config = dict(configs["vae"])
    layout = layout_of(model, local=True)
    kind, schedule_kind = denoiser_classes(layout)
    with device:
        text_encoder = _text_encoders(model, configs)
        vae = AutoencoderKL.from_config(vae_config) if with_vae else None
        denoiser = kind.from_config(dict(configs[layout.denoiser]))
    schedule = schedule_kind.from_config(dict(configs["scheduler"]))
    latents = LatentFormat.of(AutoencoderKL.from_config(vae_config).config) if vae is None else vae
    decoder = build_decoder(model, layout, latents, denoiser, schedule)
    return VLVAutoEncoder(encoder, text_encoder, decoder, time_ids=model.time_ids)


def build_captioner(
    model: ModelConfig,
    configs: Configs,
    tokenizer: Any,
    device: torch.device,
    caption_tokenizer: Any = (),
) -> VLVCaptioner:
    """A captioner with random weights and everything trainable; arguments as above."""
    encoder = _encoder(model, configs, tokenizer, device)
    with device:
        text_encoder = _text_encoders(model, configs)
        language_model = Qwen2ForCausalLM(Qwen2Config.from_dict(_copy(configs["language_model"])))
        hidden = language_model.config.hidden_size
        projector = build_language_projector(text_encoder.width, hidden, model.projector_seed)
    return VLVCaptioner(encoder, text_encoder, projector, language_model, caption_tokenizer)


def prompt_tokenizer(model: ModelConfig) -> Any:
    """Florence-2's tokenizer from a local folder, or one that only estimates the prompt's length."""
    source = part_source(model, "florence")
    if isinstance(source.location, Path):
        try:
            return AutoTokenizer.from_pretrained(source.name)
        except (OSError, ValueError, KeyError):  # a folder with the configuration alone
            pass
    return _Tokenizer()


class _Tokenizer:
    """Stands for a tokenizer whose files are not here; its ids mean nothing."""

    bos_token_id, eos_token_id = 0, 2

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[3] * round(_TOKENS_PER_WORD * len(text.split())))


def _encoder(
    model: ModelConfig, configs: Configs, tokenizer: Any, device: torch.device
) -> VLVEncoder:
    with device:
        florence = Florence2Model(Florence2Config.from_dict(_copy(configs["florence"])))
    encoder = VLVEncoder(
        florence,
        tokenizer,
        width=tuple(
            configs[part]["hidden_size"] for part in layout_of(model, local=True).text_encoders
        ),
        num_queries=model.num_queries,
        square=Square.of(model),
        encoder_image_size=model.encoder_image_size,
        prompt=model.prompt,
        projector_scale=model.projector_scale,
        seed=model.projector_seed,
    )
    return encoder.to(device)


def _text_encoders(model: ModelConfig, configs: Configs) -> TextEncoder | ClipPair:
    layout = layout_of(model, local=True)
    clips = []
    for part, kind in text_encoder_classes(layout).items():
        content = _copy(configs[part])
        # The last two tokens, as in CLIP's vocabulary; the default ids are outside a smaller one.
        last = content["vocab_size"] - 1
        content = {"bos_token_id": last - 1, "eos_token_id": last, **content}
        clips.append(kind(CLIPTextConfig.from_dict(content)))
    return build_text_encoders(model, layout, clips, [None] * len(clips))


def _read(part: str, source: Source) -> Mapping[str, Any]:
    if (config := find_config(part, source)) is not None:
        return config
    name = CONFIG_FILES.get(part, "config.json")
    if source.repo is None:
        raise ModelError(f"{part}: '{source}' has no {name}: give a pretrained folder or a hub id")
    near = difflib.get_close_matches(source.repo, BY_REPO, n=2, cutoff=0.4) or list(BY_REPO)
    raise ModelError(
        f"{part}: the configuration of '{source}' is neither in the hub's cache nor known here: give "
        f"a folder with its {name}, or one of {', '.join(near)}"
    )


def _copy(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy: transformers modifies the dictionaries it gets."""
    return {name: _copy(v) if isinstance(v, Mapping) else v for name, v in config.items()}
