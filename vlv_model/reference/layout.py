"""Names of the published implementation's weights, and ours.

Its Florence-2 has the layout of Microsoft's remote code, not of transformers' own classes. Its text
encoder has the prefix `text_model.`. Stage 2 contains stage 1, without VAE and UNet, under
`VLV_model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_VISION = "encoder.florence.vision_tower"
_PROJECTOR = "encoder.florence.multi_modal_projector"
_BLOCK = "vision_tower.blocks.{stage}.{block}"

# (ours, theirs); {rest} matches the rest of a name, other fields match one component.
STAGE1_NAMES = (
    ("encoder.learnable_queries", "query_embed"),
    ("encoder.caption_projector.{rest}", "language_proj.{rest}"),
    (f"{_VISION}.convs.{{i}}.conv.{{rest}}", "model.vision_tower.convs.{i}.proj.{rest}"),
    (f"{_VISION}.convs.{{i}}.norm.{{rest}}", "model.vision_tower.convs.{i}.norm.{rest}"),
    *(
        (f"encoder.florence.{_BLOCK}.{kind}_block.{ours}", f"model.{_BLOCK}.{kind}_block.{theirs}")
        for kind, attention in (("spatial", "window_attn"), ("channel", "channel_attn"))
        for ours, theirs in (
            ("conv1.{rest}", "conv1.fn.dw.{rest}"),
            ("conv2.{rest}", "conv2.fn.dw.{rest}"),
            ("norm1.{rest}", f"{attention}.norm.{{rest}}"),
            (f"{attention}.{{rest}}", f"{attention}.fn.{{rest}}"),
            ("norm2.{rest}", "ffn.norm.{rest}"),
            ("ffn.{rest}", "ffn.fn.net.{rest}"),
        )
    ),
    (f"{_PROJECTOR}.image_projection.weight", "model.image_projection"),
    (f"{_PROJECTOR}.image_proj_norm.{{rest}}", "model.image_proj_norm.{rest}"),
    (f"{_PROJECTOR}.image_position_embed.{{rest}}", "model.image_pos_embed.{rest}"),
    (f"{_PROJECTOR}.visual_temporal_embed.{{rest}}", "model.visual_temporal_embed.{rest}"),
    ("encoder.florence.language_model.{rest}", "model.language_model.model.{rest}"),
    ("text_encoder.clip.{rest}", "text_encoder.text_model.{rest}"),
    ("diffusion_decoder.vae.{rest}", "vae.{rest}"),
    ("diffusion_decoder.unet.{rest}", "unet.{rest}"),
)
STAGE2_NAMES = (
    *((ours, f"VLV_model.{theirs}") for ours, theirs in STAGE1_NAMES),
    ("language_projector.{rest}", "mlp.layers.{rest}"),
    ("language_model.{rest}", "qwen2_model.{rest}"),
)

# A plain matrix there (x @ W), the weight of a linear layer here.
TRANSPOSED = ("model.image_projection",)
# Tables that transformers pads with rows for tokens the published vocabulary lacks.
PADDED = tuple(
    f"model.language_model.model.{table}.weight"
    for table in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
)
# Florence-2's language-modelling head, unused here.
HEAD = "model.language_model.lm_head.weight"
BIAS = "model.language_model.final_logits_bias"
# A buffer that older versions of transformers saved, and the table that it indexes.
POSITION_IDS = "text_encoder.text_model.embeddings.position_ids"
POSITIONS = "text_encoder.text_model.embeddings.position_embedding.weight"


@dataclass(frozen=True)
class Expected:
    """A tensor of the published state dict, and its name in our model."""

    ours: str
    shape: list[int]
    transposed: bool = False
    padded: bool = False  # it may have fewer rows than ours


def expected_tensors(weights: Mapping[str, Tensor], stage: str) -> dict[str, Expected]:
    """The published tensors of a stage by their names, from our model's state dict `weights`."""
    names = STAGE2_NAMES if stage == "stage2" else STAGE1_NAMES
    rules = [(_pattern(ours), theirs) for ours, theirs in names]
    found: dict[str, Expected] = {}
    for ours, tensor in weights.items():
        matches = [(rule.fullmatch(ours), theirs) for rule, theirs in rules]
        (their,) = [theirs.format(**m.groupdict()) for m, theirs in matches if m]
        plain = their.removeprefix("VLV_model.")
        shape = list(tensor.shape)
        found[their] = Expected(
            ours,
            shape[::-1] if plain in TRANSPOSED else shape,
            transposed=plain in TRANSPOSED,
            padded=plain in PADDED,
        )
    return found


def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{rest\}", "(?P<rest>.+)")
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", pattern))
