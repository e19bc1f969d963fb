"""Writes a complete set of tiny, randomly initialised models in the usual pretrained layout.

Classes, folders and kinds of tokenizers are those of the full size, so tests and newcomers run the
real loading code without a model hub:

    model.json                                       a ModelConfig, paths relative to the folder
    florence/                                        Florence-2 and its BART tokenizer
    diffusion/{vae,unet,text_encoder,tokenizer,scheduler}   Stable Diffusion
    language_model/                                  Qwen2 and its byte-level tokenizer

`write_tiny_sdxl` and `write_tiny_sd3` write the other decoders, small enough for a test.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaTokenizer,
)

from vlv_model.checkpoints.loading import quietly

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# All sizes of the tiny models are here.
NUM_QUERIES = 16
TEXT_POSITIONS = 20  # a scene's caption has 13 or 14 words, two special tokens, and some padding
IMAGE_SIZE = 64
LATENT_CHANNELS = 8  # VAE f=8: latents [8 8 8]; with 4 the shapes of small objects are lost
ENCODER_IMAGE_SIZE = 128  # vision strides 8 * 2 * 1: a grid of 8 x 8 image features

# At scale 1 each image starts with different noise: stage 1 first learns to ignore the embeddings,
# and then learns the objects' relation slowly.
PROJECTOR_SCALE = 0.15

NUM_LOCATIONS = 16  # Florence-2's location tokens, 1000 in the original

# For transformers of width 32 to 128. The published models' 0.02 suits a width of 1,000; here it
# leaves attention uniform for a thousand steps.
INIT_STD = 0.1

VISION: dict[str, Any] = {
    "depths": [1, 1, 1],
    "patch_size": [9, 3, 3],
    "patch_stride": [8, 2, 1],
    "patch_padding": [4, 1, 1],
    "patch_prenorm": [False, True, True],
    "embed_dim": [32, 64, 128],
    "num_heads": [1, 2, 4],
    "num_groups": [1, 2, 4],
    "window_size": 4,
    "projection_dim": 64,
    "initializer_range": INIT_STD,
    "max_position_embeddings": 16,
}
BART: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 160,  # 65 image features + the prompt, at most a token per byte
    # The published model has 0.1, which at a width of 64 loses small details.
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": INIT_STD,
}
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 4,  # one group per channel would normalise the colours away
    "sample_size": IMAGE_SIZE,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [64, 96],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],  # diffusers' name for the number of heads, as in SD 2.1
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "norm_num_groups": 16,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}
CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TEXT_POSITIONS,
    "hidden_act": "gelu",
}
# About the std of an untrained caption projector's output, so stage 1 starts in the range that the
# text encoder was trained on. (The default, 0.02, is far from it.)
TOKEN_EMBEDDING_STD = 0.3
QWEN: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "attention_dropout": 0.1,  # makes it rely on the image more than on word statistics
    "initializer_range": INIT_STD,
    "tie_word_embeddings": True,
}

# Words of the scenes' captions: each is one token, with and without a leading space. All other text
# falls back to bytes.
SCENE_TEXT = """
a an the and of on in at to with next is are there picture image scene shows background corner
left right above below over under inside behind between front top bottom middle center
tiny small just large big huge thin thick one two three four five
red green blue yellow orange purple pink brown black white gray cyan magenta teal navy lime
circle square triangle rectangle star diamond cross ring heart hexagon pentagon ellipse oval line
circles squares triangles rectangles stars diamonds crosses rings hearts hexagons lines
object objects Describe Locate paragraph category name with their descriptions what shown
"""
SCENE_WORDS = SCENE_TEXT.split()


def write_tiny_models(folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write all models below `folder` and return it; the same seed gives the same weights.

    Every `from_pretrained` of this package accepts the folder as `model`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        _write_florence(folder / "florence")
        _write_diffusion(folder / "diffusion")
        _write_language_model(folder / "language_model")
    model = {
        "florence": "florence",
        "diffusion": "diffusion",
        "language_model": "language_model",
        "num_queries": NUM_QUERIES,
        "image_size": IMAGE_SIZE,
        "encoder_image_size": ENCODER_IMAGE_SIZE,
        "projector_scale": PROJECTOR_SCALE,
    }
    (folder / "model.json").write_text(json.dumps(model, indent=2) + "\n", encoding="utf-8")
    return folder


def _write_florence(folder: Path) -> None:
    special = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
    ]  # BART's order: its config expects ids 0, 1, 2
    merges = word_merges(spaced_words())
    vocab = vocabulary(special + sorted(pre_tokenizers.ByteLevel.alphabet()), merges)
    added = ["<mask>", "<image>", *(f"<loc_{i}>" for i in range(NUM_LOCATIONS))]
    vocab |= {token: len(vocab) + i for i, token in enumerate(added)}
    tokenizer = RobertaTokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": added[1:]})
    config = Florence2Config(
        vision_config=VISION,
        text_config={"model_type": "bart", "vocab_size": len(vocab), **BART},
        image_token_id=vocab["<image>"],
    )
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_diffusion(folder: Path) -> None:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    tokenizer = clip_tokenizer()
    text_config = clip_config(tokenizer, CLIP_TEXT)
    vae = AutoencoderKL(**VAE)
    with torch.no_grad():  # a narrow posterior, as trained VAEs have: a sample is close to the mean
        vae.quant_conv.bias[VAE["latent_channels"] :] = -8.0  # log-variance
    vae.register_to_config(scaling_factor=_scaling_factor(vae))
    text_encoder = CLIPTextModel(text_config)
    with torch.no_grad():
        text_encoder.embeddings.token_embedding.weight.normal_(std=TOKEN_EMBEDDING_STD)
        text_encoder.embeddings.position_embedding.weight.normal_(std=TOKEN_EMBEDDING_STD / 2)
    text_encoder.save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")
    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    DDPMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    tokenizer.save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


def clip_tokenizer() -> CLIPTokenizer:
    """A tokenizer with a token for each word of SCENE_WORDS; other text falls back to bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = word_merges([word.lower() for word in SCENE_WORDS], end_of_word="</w>")
    vocab = vocabulary(alphabet + [f"{byte}</w>" for byte in alphabet], merges)
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_POSITIONS)


def clip_config(tokenizer: CLIPTokenizer, sizes: dict[str, Any]) -> CLIPTextConfig:
    """The configuration of a text encoder for this tokenizer; `sizes` as in CLIP_TEXT."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_language_model(folder: Path) -> None:
    # No normaliser (Qwen's tokenizer applies NFC): any caption decodes back exactly.
    merges = word_merges(spaced_words())
    vocab = vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()), merges)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # transformers would zero its embedding, and pad is the end-of-text
        **QWEN,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _scaling_factor(vae: AutoencoderKL) -> float:
    """1 / std of the latents of random rectangles; published VAEs set it the same way."""
    with torch.no_grad():
        latents = vae.encode(_random_rectangles(16)).latent_dist.mean
    return 1.0 / float(latents.std())


def _random_rectangles(count: int) -> Tensor:
    """Plain backgrounds with one filled rectangle each, float `[count 3 64 64]` in [-1, 1]."""
    images = (torch.rand(count, 3, 1, 1) * 2 - 1).repeat(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    for image in images:
        top, left = torch.randint(0, IMAGE_SIZE // 2, (2,)).tolist()
        height, width = torch.randint(8, IMAGE_SIZE // 2, (2,)).tolist()
        image[:, top : top + height, left : left + width] = torch.rand(3, 1, 1) * 2 - 1
    return images


def spaced_words() -> list[str]:
    """The words of the scenes' captions, with and without a leading space."""
    return [f"{space}{word}" for word in SCENE_WORDS for space in ("", " ")]


def word_merges(words: list[str], end_of_word: str = "") -> list[tuple[str, str]]:
    """Byte-pair merges that make each of `words` one token, the most frequent pair first.

    Ties are broken alphabetically: the tokenizers library's trainer breaks them by hash order, so
    every process would get a different tokenizer.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [list(byte_level.pre_tokenize_str(word)[0][0]) for word in words]
    for piece in pieces:
        piece[-1] += end_of_word
    merges = []
    while pairs := Counter(pair for piece in pieces for pair in pairwise(piece)):
        merge = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(merge)
        pieces = [_merged(piece, merge) for piece in pieces]
    return merges


def _merged(piece: list[str], merge: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in piece:
        if merged and (merged[-1], symbol) == merge:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def vocabulary(base: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    """Ids of the tokens of `base`, then of those that `merges` make."""
    tokens = list(dict.fromkeys([*base, *(left + right for left, right in merges)]))
    return {token: index for index, token in enumerate(tokens)}
