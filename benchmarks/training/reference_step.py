"""The published training step, as the baseline for ours.

Trains as the authors do, in float32, with the same transformers and diffusers modules as ours. Squares
go to the CPU, through Florence-2's image processor, and back. The VAE runs in every step, the UNet uses
activation checkpointing, captions are padded to 300 tokens, and logits are computed at every position.
It shares no forward code with vlv_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlv_model.captioner import VLVCaptioner

if TYPE_CHECKING:
    from vlv_model.autoencoder import VLVAutoEncoder

CAPTION_TOKENS = 300
IGNORED = -100
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def reference_processor(side: int) -> CLIPImageProcessorPil:
    """The published image processor: pictures -> float32 `[n 3 side side]`, on the CPU."""
    size = {"height": side, "width": side}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, **IMAGENET)


class ReferenceEncoder(nn.Module):
    """Squares in [-1, 1] `[b 3 s s]` -> CLIP embeddings `[b q d]`, with the image processor."""

    def __init__(self, model: VLVAutoEncoder | VLVCaptioner) -> None:
        super().__init__()
        self.florence = model.encoder.florence
        self.queries = model.encoder.learnable_queries
        self.language_proj = model.encoder.caption_projector
        self.clip = model.text_encoder.clip
        self.prompt_ids = model.encoder.prompt_ids
        self.processor = reference_processor(model.encoder.encoder_image_size)

    def forward(self, images: Tensor) -> Tensor:
        levels = ((images * 0.5 + 0.5) * 255).round().to("cpu", torch.uint8)
        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in levels]
        pixels = self.processor(pictures, return_tensors="pt").pixel_values.to(images.device)
        bart, batch = self.florence.language_model, len(images)
        features = self.florence.get_image_features(pixels).pooler_output
        prompt = bart.shared(self.prompt_ids.expand(batch, -1))
        memory = bart.encoder(inputs_embeds=torch.cat([features, prompt], dim=1))
        hidden = bart.decoder(
            inputs_embeds=self.queries.expand(batch, -1, -1),
            encoder_hidden_states=memory.last_hidden_state,
        ).last_hidden_state
        return self._clip_embeddings(self.language_proj(hidden))

    def _clip_embeddings(self, embeddings: Tensor) -> Tensor:
        hidden = self.clip.embeddings(inputs_embeds=embeddings)
        mask = create_causal_mask(
            config=self.clip.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
        )
        encoded = self.clip.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True)
        return self.clip.final_layer_norm(encoded.last_hidden_state)


class ReferenceStage1(nn.Module):
    """The denoising loss, a scalar, of squares in [-1, 1] on the model's device."""

    def __init__(self, model: VLVAutoEncoder) -> None:
        super().__init__()
        self.encoder = ReferenceEncoder(model)
        decoder = model.diffusion_decoder
        self.vae, self.unet, self.scheduler = decoder.vae, decoder.unet, decoder.noise_scheduler
        self.unet.enable_gradient_checkpointing()

    def forward(
        self, images: Tensor, noise: Tensor, timesteps: Tensor, posterior_noise: Tensor
    ) -> Tensor:
        with torch.no_grad():
            posterior = self.vae.encode(images).latent_dist
            latents = posterior.mean + posterior.std * posterior_noise
            latents = latents * self.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        is_velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
        condition = self.encoder(images)
        return F.mse_loss(self.unet(noisy, timesteps, condition).sample, target)


class ReferenceStage2(nn.Module):
    """The caption loss, a scalar, of squares in [-1, 1] on the model's device and their captions."""

    def __init__(self, model: VLVCaptioner) -> None:
        super().__init__()
        self.encoder = ReferenceEncoder(model)
        self.mlp, self.qwen = model.language_projector, model.language_model
        self.tokenizer = model.tokenizer

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        tokens = {name: ids.to(images.device) for name, ids in self._tokenize(captions).items()}
        prefix = self.mlp(self.encoder(images))
        embeddings = self.qwen.get_input_embeddings()(tokens["input_ids"])
        batch, queries = prefix.shape[:2]
        seen = tokens["attention_mask"].new_ones(batch, queries)
        unlabelled = tokens["labels"].new_full((batch, queries), IGNORED)
        loss: Tensor = self.qwen(
            inputs_embeds=torch.cat([prefix, embeddings], dim=1),
            attention_mask=torch.cat([seen, tokens["attention_mask"]], dim=1),
            labels=torch.cat([unlabelled, tokens["labels"]], dim=1),
            use_cache=False,
        ).loss
        return loss

    def _tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        # With the end-of-text, which the published targets lack, so that both losses are equal.
        end = self.tokenizer.eos_token_id
        tokens: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for ids in self.tokenizer(list(captions), add_special_tokens=False).input_ids:
            ids = [*ids, end][:CAPTION_TOKENS]
            rest = CAPTION_TOKENS - len(ids)
            tokens["input_ids"].append(ids + [end] * rest)
            tokens["attention_mask"].append([1] * len(ids) + [0] * rest)
            tokens["labels"].append(ids + [IGNORED] * rest)
        return {name: torch.tensor(rows) for name, rows in tokens.items()}


class ReferenceStep:
    """One update: loss, backward, gradient clipping, torch's AdamW."""

    def __init__(self, loss: ReferenceStage1 | ReferenceStage2, rate: float) -> None:
        self.loss = loss
        self.trained = [p for p in loss.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.01
        )

    def __call__(self, images: Tensor, *rest: Any) -> float:
        """Squares in [-1, 1] and the loss's other arguments, on any device -> the loss."""
        device = self.trained[0].device
        loss = self.loss(*(v.to(device) if isinstance(v, Tensor) else v for v in (images, *rest)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())
