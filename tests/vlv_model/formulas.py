"""An independent implementation of the method from formulas, to compare our classes with.

Nothing here touches vlv_model. Transformer stacks are written out from state dicts; of the vision
tower, the VAE and the UNet the libraries' forward is used, freshly loaded. Eval mode, float32.
"""

import math

import torch
import torch.nn.functional as F


def linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def attention(query, key, value, num_heads, causal=False):
    def heads(x):
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    query, key, value = heads(query), heads(key), heads(value)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        scores = scores.masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def attend(weights, name, x, memory, num_heads, causal=False):
    query, key, value = (
        linear(weights, f"{name}.{kind}_proj", source)
        for kind, source in (("q", x), ("k", memory), ("v", memory))
    )
    return linear(weights, f"{name}.out_proj", attention(query, key, value, num_heads, causal))


def bart(weights, name, x, num_layers, num_heads, memory=None):
    """BART's encoder, or its decoder if there is a memory: post-norm, positions offset by 2."""
    positions = weights[f"{name}.embed_positions.weight"][2 : 2 + x.shape[1]]
    x = norm(weights, f"{name}.layernorm_embedding", x + positions)
    for i in range(num_layers):
        layer = f"{name}.layers.{i}"
        y = attend(weights, f"{layer}.self_attn", x, x, num_heads, causal=memory is not None)
        x = norm(weights, f"{layer}.self_attn_layer_norm", x + y)
        if memory is not None:
            y = attend(weights, f"{layer}.encoder_attn", x, memory, num_heads)
            x = norm(weights, f"{layer}.encoder_attn_layer_norm", x + y)
        y = linear(weights, f"{layer}.fc2", F.gelu(linear(weights, f"{layer}.fc1", x)))
        x = norm(weights, f"{layer}.final_layer_norm", x + y)
    return x


def image_features(florence, pixels):
    """The vision tower (the library's), then its projector: a spatial mean and the patches."""
    x = florence.model.vision_tower(pixels).last_hidden_state  # [b c g g]
    weights = florence.model.multi_modal_projector.state_dict()
    grid = x.shape[-1]
    rows = weights["image_position_embed.row_embeddings.weight"][:grid]
    columns = weights["image_position_embed.column_embeddings.weight"][:grid]
    across = columns[None].expand(grid, -1, -1)
    down = rows[:, None].expand(-1, grid, -1)
    x = x.permute(0, 2, 3, 1) + torch.cat([across, down], dim=-1)
    x = x.flatten(1, 2) + weights["visual_temporal_embed.pos_idx_to_embed"][0]
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
    return norm(weights, "image_proj_norm", linear(weights, "image_projection", x))


def caption_embeddings(florence, tokenizer, prompt, queries, projector, pixels):
    """[image features][<s> prompt </s>] -> BART encoder; queries -> BART decoder -> projector."""
    config = florence.config.text_config
    weights = florence.model.language_model.state_dict()
    ids = tokenizer(f"<s>{prompt}</s>", add_special_tokens=False).input_ids
    sentence = weights["shared.weight"][ids].expand(len(pixels), -1, -1)
    inputs = torch.cat([image_features(florence, pixels), sentence], dim=1)
    memory = bart(weights, "encoder", inputs, config.encoder_layers, config.encoder_attention_heads)
    x = queries.expand(len(pixels), -1, -1)
    x = bart(weights, "decoder", x, config.decoder_layers, config.decoder_attention_heads, memory)
    return linear(projector, "2", F.gelu(linear(projector, "0", x)))


def clip_text(clip, x):
    """CLIP's text encoder from embeddings: pre-norm, causal, positions added, final norm."""
    weights = clip.state_dict()
    x = x + weights["embeddings.position_embedding.weight"][: x.shape[1]]
    for i in range(clip.config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        y = norm(weights, f"{layer}.layer_norm1", x)
        x = x + attend(
            weights, f"{layer}.self_attn", y, y, clip.config.num_attention_heads, causal=True
        )
        y = norm(weights, f"{layer}.layer_norm2", x)
        x = x + linear(weights, f"{layer}.mlp.fc2", F.gelu(linear(weights, f"{layer}.mlp.fc1", y)))
    return norm(weights, "final_layer_norm", x)


def alphas_cumprod(start=0.00085, end=0.012, steps=1000):
    """Stable Diffusion's "scaled linear" schedule."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, dim=0)


def stage1_loss(vae, unet, vae_pixels, noise, timesteps, posterior_noise, clip_embeddings):
    mean, log_variance = vae.quant_conv(vae.encoder(vae_pixels)).chunk(2, dim=1)
    deviation = (log_variance.clamp(-30, 20) / 2).exp()
    latents = (mean + deviation * posterior_noise) * vae.config.scaling_factor
    alpha = alphas_cumprod()[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    predicted = unet(noisy, timesteps, clip_embeddings, return_dict=False)[0]
    return ((predicted - velocity) ** 2).mean()


def qwen(model, x):
    """Qwen2 from embeddings `[b n h]`, no padding: pre-norm, rotary positions, shared heads."""
    config, weights = model.config, model.state_dict()
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads

    def rms(name, x):
        scale = (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * weights[f"{name}.weight"]

    angles = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotate(x):  # [b n heads dim]
        turned = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
        return x * cos[:, None] + turned * sin[:, None]

    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        y = rms(f"{layer}.input_layernorm", x)
        query = rotate(linear(weights, f"{layer}.self_attn.q_proj", y).unflatten(-1, (heads, dim)))
        key = rotate(linear(weights, f"{layer}.self_attn.k_proj", y).unflatten(-1, (groups, dim)))
        value = linear(weights, f"{layer}.self_attn.v_proj", y).unflatten(-1, (groups, dim))
        key, value = (t.repeat_interleave(heads // groups, dim=2) for t in (key, value))
        y = attention(query.flatten(2), key.flatten(2), value.flatten(2), heads, causal=True)
        x = x + linear(weights, f"{layer}.self_attn.o_proj", y)
        y = rms(f"{layer}.post_attention_layernorm", x)
        gate = F.silu(linear(weights, f"{layer}.mlp.gate_proj", y))
        up = linear(weights, f"{layer}.mlp.up_proj", y)
        x = x + linear(weights, f"{layer}.mlp.down_proj", gate * up)
    return rms("model.norm", x) @ weights["model.embed_tokens.weight"].T


def stage2_loss(model, prefixes, captions):
    """Rows one by one, unpadded: [prefix][caption][end-of-text] -> mean over label tokens."""
    total, count = torch.zeros(()), 0
    for prefix, ids in zip(prefixes, captions, strict=True):
        embeddings = model.get_input_embeddings().weight[ids]
        logits = qwen(model, torch.cat([prefix, embeddings])[None])[0]
        predicted = logits[len(prefix) - 1 : -1].log_softmax(-1)
        total = total - sum(predicted[i, token] for i, token in enumerate(ids))
        count += len(ids)
    return total / count
