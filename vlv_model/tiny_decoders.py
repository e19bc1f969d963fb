"""Writes a random SDXL and SD 3.5 that only show that the code is right: as small as the classes allow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from vlv_model.checkpoints.loading import quietly
from vlv_model.tiny import CLIP_TEXT, INIT_STD, UNET, VAE, clip_config, clip_tokenizer, write_json

SMALL_CLIP_WIDTHS = (32, 48)  # CLIP-L and bigG: 768 and 1280
SMALL_VAE: dict[str, Any] = {
    **{k: v for k, v in VAE.items() if k != "latent_channels"},
    "block_out_channels": [8, 8, 8, 8],
}
SDXL_UNET: dict[str, Any] = {
    **UNET,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [16, 32],
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": sum(SMALL_CLIP_WIDTHS),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": SMALL_CLIP_WIDTHS[1] + 6 * 8,
}
SDXL_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SD3_VAE: dict[str, Any] = {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
SD3_TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "caption_projection_dim": 32,
    "joint_attention_dim": 128,
    "pooled_projection_dim": sum(SMALL_CLIP_WIDTHS),
    "pos_embed_max_size": 12,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0,),
}


def write_tiny_sdxl(folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write a random SDXL in diffusers' layout and return its folder: a `diffusion` of ModelConfig."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        _write_clip_pair(folder, CLIPTextModel)
        AutoencoderKL(**SMALL_VAE, latent_channels=4, scaling_factor=0.13025).save_pretrained(
            folder / "vae"
        )
        UNet2DConditionModel(**SDXL_UNET).save_pretrained(folder / "unet")
        EulerDiscreteScheduler(**SDXL_SCHEDULER).save_pretrained(folder / "scheduler")
    write_json(
        folder / "model_index.json",
        {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True},
    )
    return folder


def write_tiny_sd3(folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write a random SD 3.5 without T5 and return its folder: a `diffusion` of ModelConfig."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        _write_clip_pair(folder, CLIPTextModelWithProjection)
        AutoencoderKL(**SMALL_VAE, **SD3_VAE).save_pretrained(folder / "vae")
        transformer = SD3Transformer2DModel(**SD3_TRANSFORMER)
        with torch.no_grad():
            for parameter in transformer.proj_out.parameters():
                parameter.normal_(std=INIT_STD)
        transformer.save_pretrained(folder / "transformer")
        FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusion3Pipeline"})
    return folder


def _write_clip_pair(folder: Path, first: Any) -> None:
    tokenizer = clip_tokenizer()
    for part, kind, width in (
        ("text_encoder", first, SMALL_CLIP_WIDTHS[0]),
        ("text_encoder_2", CLIPTextModelWithProjection, SMALL_CLIP_WIDTHS[1]),
    ):
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
        config = clip_config(tokenizer, {**CLIP_TEXT, "num_hidden_layers": 3, **sizes})
        kind(config).save_pretrained(folder / part)
        tokenizer.save_pretrained(folder / part.replace("text_encoder", "tokenizer"))
