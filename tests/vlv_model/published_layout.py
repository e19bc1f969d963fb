"""State dicts in the layout of the method's published implementation, made from models of ours.

Written module by module from the published names, apart from the importer's own map.
"""

from torch import Tensor

from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.captioner import VLVCaptioner


def _put(out: dict[str, Tensor], name: str, module) -> None:
    out[f"{name}.weight"] = module.weight
    if getattr(module, "bias", None) is not None:
        out[f"{name}.bias"] = module.bias


def _all_of(out: dict[str, Tensor], prefix: str, module) -> None:
    out |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def florence(model, lacking_rows: int = 0) -> dict[str, Tensor]:
    """Florence2ForConditionalGeneration of the remote code; its head has a copy of the embeddings."""
    out: dict[str, Tensor] = {}
    tower, projector = model.vision_tower, model.multi_modal_projector
    for s, stem in enumerate(tower.convs):
        _put(out, f"vision_tower.convs.{s}.proj", stem.conv)
        _put(out, f"vision_tower.convs.{s}.norm", stem.norm)
    for s, stage in enumerate(tower.blocks):
        for b, pair in enumerate(stage):
            halves = (
                ("spatial_block", pair.spatial_block, "window_attn"),
                ("channel_block", pair.channel_block, "channel_attn"),
            )
            for half, block, attention in halves:
                name = f"vision_tower.blocks.{s}.{b}.{half}"
                _put(out, f"{name}.conv1.fn.dw", block.conv1)
                _put(out, f"{name}.{attention}.norm", block.norm1)
                _put(out, f"{name}.{attention}.fn.qkv", getattr(block, attention).qkv)
                _put(out, f"{name}.{attention}.fn.proj", getattr(block, attention).proj)
                _put(out, f"{name}.conv2.fn.dw", block.conv2)
                _put(out, f"{name}.ffn.norm", block.norm2)
                _put(out, f"{name}.ffn.fn.net.fc1", block.ffn.fc1)
                _put(out, f"{name}.ffn.fn.net.fc2", block.ffn.fc2)
    out["image_projection"] = projector.image_projection.weight.T
    _put(out, "image_proj_norm", projector.image_proj_norm)
    positions = projector.image_position_embed
    _put(out, "image_pos_embed.row_embeddings", positions.row_embeddings)
    _put(out, "image_pos_embed.column_embeddings", positions.column_embeddings)
    out["visual_temporal_embed.pos_idx_to_embed"] = projector.visual_temporal_embed.pos_idx_to_embed
    bart = model.language_model
    _all_of(out, "language_model.model.encoder", bart.encoder)
    _all_of(out, "language_model.model.decoder", bart.decoder)
    words = bart.shared.weight[: bart.shared.weight.shape[0] - lacking_rows]
    for table in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
        out[f"language_model.model.{table}.weight"] = words
    out["language_model.lm_head.weight"] = words.clone()
    out["language_model.final_logits_bias"] = words.new_zeros(1, words.shape[0])
    return out


def stage1(model: VLVAutoEncoder | VLVCaptioner, lacking_rows: int = 0) -> dict[str, Tensor]:
    out = {f"model.{n}": t for n, t in florence(model.encoder.florence, lacking_rows).items()}
    out["query_embed"] = model.encoder.learnable_queries
    _put(out, "language_proj.0", model.encoder.caption_projector[0])
    _put(out, "language_proj.2", model.encoder.caption_projector[2])
    _all_of(out, "text_encoder.text_model", model.text_encoder.clip)
    if isinstance(model, VLVAutoEncoder):
        _all_of(out, "vae", model.diffusion_decoder.vae)
        _all_of(out, "unet", model.diffusion_decoder.unet)
    return out


def stage2(model: VLVCaptioner, lacking_rows: int = 0) -> dict[str, Tensor]:
    out = {f"VLV_model.{name}": t for name, t in stage1(model, lacking_rows).items()}
    _put(out, "mlp.layers.0", model.language_projector[0])
    _put(out, "mlp.layers.2", model.language_projector[2])
    _all_of(out, "qwen2_model", model.language_model)
    return out
