"""The VLV encoder: Florence-2 with learnable queries, from an image to caption embeddings.

The BART encoder reads the vision tower's features and the task prompt. The BART decoder reads
learnable queries instead of text and cross-attends to the encoder. (arXiv 2507.07104, stage 1)
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Florence2Model, PreTrainedTokenizerBase

from vlv_model.checkpoints import loading
from vlv_model.checkpoints.weights import load_checkpoint
from vlv_model.config import Precision
from vlv_model.errors import ModelError
from vlv_model.freezing import freeze, thaw
from vlv_model.precision import cast
from vlv_model.preprocessing import check_squares, encoder_pixels
from vlv_model.squares import Square


class VLVEncoder(nn.Module):
    """uint8 squares `[b 3 s s]` -> caption embeddings `[b q d]`, d the text encoders' widths together.

    Vision tower, its projector and the shared token embeddings are always frozen. The BART
    encoder and decoder, the queries and the caption projector are trainable (`set_trainable`).
    """

    ignored_parts = ("language_projector", "language_model")  # of a stage-2 checkpoint
    # Trained in stage 1, by prefix; new_parts are in no pretrained model.
    new_parts = ("learnable_queries", "caption_projector")
    trained_parts = (
        *new_parts,
        "florence.language_model.encoder",
        "florence.language_model.decoder",
    )

    def __init__(
        self,
        florence: Florence2Model,
        tokenizer: PreTrainedTokenizerBase,
        *,
        width: int | tuple[int, ...],
        num_queries: int,
        square: Square,
        encoder_image_size: int,
        prompt: str,
        projector_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.widths = (width,) if isinstance(width, int) else width
        self.florence = florence
        # DeepSpeed casts parameters only: a sinusoid buffer before this layer stays float32 and
        # would make the features float32 too.
        florence.multi_modal_projector.image_projection.register_forward_pre_hook(
            _cast_to_weight_dtype
        )
        self.square = square
        self.encoder_image_size = encoder_image_size
        d_model = florence.config.text_config.d_model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.learnable_queries = nn.Parameter(torch.randn(1, num_queries, d_model))
            projectors = [_projector(d_model, one) for one in self.widths]
        with torch.no_grad():
            for projector in projectors:
                for parameter in projector[-1].parameters():
                    parameter.mul_(projector_scale)
        (only, *more) = projectors
        self.caption_projector = SideBySide(projectors) if more else only
        # As Florence-2's processor does: <s> sentence </s>, without padding.
        sentence = tokenizer(prompt, add_special_tokens=False).input_ids
        prompt_ids = torch.tensor([[tokenizer.bos_token_id, *sentence, tokenizer.eos_token_id]])
        self.register_buffer("prompt_ids", prompt_ids, persistent=False)
        self._check_positions()
        self.set_trainable(language_model=True, queries=True)

    @classmethod
    def from_pretrained(
        cls,
        model: loading.Model | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        precision: Precision = "float32",
        **parts: Any,
    ) -> VLVEncoder:
        """Build from pretrained Florence-2, then load the trained weights, if any, strictly.

        `model` is a ModelConfig, a folder with model.json, or a checkpoint folder (of a stage-2
        checkpoint the language model is ignored); `parts` are fields of ModelConfig that override
        it, such as `florence="folder or hub id"`. Returned in `precision`, on the CPU, in eval mode.
        Raises ModelError or CheckpointError.
        """
        config, checkpoint = loading.resolve_checkpoint(model, checkpoint, parts)
        florence, tokenizer = loading.load_florence(config, precision)
        encoder = cls(
            florence,
            tokenizer,
            width=loading.caption_widths(config),
            num_queries=config.num_queries,
            square=Square.of(config),
            encoder_image_size=config.encoder_image_size,
            prompt=config.prompt,
            projector_scale=config.projector_scale,
            seed=config.projector_seed,
        ).eval()
        cast(encoder, precision)
        if checkpoint is not None:
            load_checkpoint(checkpoint, encoder, model=config, prefix="encoder.")
        return encoder

    @property
    def base_parts(self) -> tuple[str, ...]:
        """The pretrained parts with weights that its training depends on."""
        second = ("text_encoder_2",) if len(self.widths) > 1 else ()
        return ("florence", "text_encoder", *second)

    def set_trainable(self, *, language_model: bool, queries: bool) -> None:
        """Choose what is trained: Florence-2's language model; the queries and caption projector."""
        # Part by part: a frozen Florence-2 would not pass train() on to its language model.
        freeze(self.florence.vision_tower)
        freeze(self.florence.multi_modal_projector)
        (thaw if language_model else freeze)(self.florence.language_model)
        for embeddings in self._shared_embeddings():
            freeze(embeddings)
        (thaw if queries else freeze)(self.caption_projector)
        self.learnable_queries.requires_grad_(queries)

    @property
    def num_queries(self) -> int:
        """Learnable queries = caption embeddings per image."""
        return self.learnable_queries.shape[1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """uint8 squares `[b 3 s s]`, or float encoder pixels `[b 3 e e]` -> `[b q d]`.

        Float input must be resized and normalised already (`preprocessing.encoder_pixels`). Raises
        ModelError for squares of another size than the model's.
        """
        if pixel_values.dtype == torch.uint8:
            check_squares(pixel_values, self.square.size)
            pixel_values = encoder_pixels(pixel_values, self.encoder_image_size)
        bart = self.florence.language_model
        dtype = self.learnable_queries.dtype
        with torch.no_grad():  # vision tower and token embeddings are frozen
            image_features = self.florence.get_image_features(pixel_values).pooler_output  # [b i m]
            prompt = bart.shared(self.prompt_ids)  # [1 p m]
        batch = image_features.shape[0]
        inputs = torch.cat([image_features, prompt.expand(batch, -1, -1)], dim=1).to(dtype)
        memory = bart.encoder(inputs_embeds=inputs).last_hidden_state  # [b i+p m]
        hidden = bart.decoder(
            inputs_embeds=self.learnable_queries.expand(batch, -1, -1),
            encoder_hidden_states=memory,
            use_cache=False,
        ).last_hidden_state  # [b q m]
        return self.caption_projector(hidden)  # [b q d]

    def _shared_embeddings(self) -> list[nn.Module]:
        """The token embeddings: three modules that share one (tied) table."""
        bart = self.florence.language_model
        return [bart.shared, bart.encoder.embed_tokens, bart.decoder.embed_tokens]

    def _check_positions(self) -> None:
        text = self.florence.config.text_config
        vision = self.florence.config.vision_config
        grid = self.encoder_image_size
        for stride, size, pad in zip(
            vision.patch_stride, vision.patch_size, vision.patch_padding, strict=True
        ):
            grid = (grid + 2 * pad - size) // stride + 1
        needed = {"num_queries": self.num_queries}
        needed["image features and prompt"] = 1 + grid**2 + self.prompt_ids.shape[1]
        for what, length in needed.items():
            if length > text.max_position_embeddings:
                raise ModelError(
                    f"{what} need {length} positions, Florence-2's language model has "
                    f"{text.max_position_embeddings}: lower num_queries or encoder_image_size"
                )
        if not 1 <= grid <= vision.max_position_embeddings:
            raise ModelError(
                f"encoder_image_size {self.encoder_image_size} gives a {grid} x {grid} grid, expected "
                f"1 to {vision.max_position_embeddings} per side (the vision tower's positions)"
            )


class SideBySide(nn.ModuleList):
    """The caption projectors of several text encoders; their outputs, joined along the width."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`[b q m]` -> `[b q d]`, d the sum of the widths."""
        return torch.cat([projector(hidden) for projector in self], dim=-1)


def _projector(d_model: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_model, width), nn.GELU(), nn.Linear(width, width))


def _cast_to_weight_dtype(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.to(layer.weight.dtype) for value in inputs)
