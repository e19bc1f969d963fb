"""The VLV captioner (stage 2): CLIP embeddings become the prefix of a language model.

(arXiv 2507.07104, stage 2)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, get_args, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2ForCausalLM

from vlv_model.caption_tokens import (
    IGNORED,
    GeneratedCaption,
    caption_text,
    decode_captions,
    end_of_text_id,
    tokenize_captions,
)
from vlv_model.checkpoints import loading
from vlv_model.checkpoints.weights import load_checkpoint, read_checkpoint
from vlv_model.clip_pair import ClipPair
from vlv_model.config import Lora, Precision, Trainable
from vlv_model.decoding import FinishedSequence, Sampling, SlotDecoder, decode
from vlv_model.encoder import VLVEncoder
from vlv_model.errors import ModelError
from vlv_model.freezing import evaluating, freeze, thaw
from vlv_model.lora import add_adapters, merge_adapters, train_only_adapters
from vlv_model.precision import cast
from vlv_model.squares import Picture
from vlv_model.text_encoder import TextEncoder


class VLVCaptioner(nn.Module):
    """Encoder, frozen text encoder, language projector and caption decoder (Qwen2.5)."""

    ignored_parts = ()  # it has a place for everything in a checkpoint
    new_parts = (
        *(f"encoder.{part}" for part in VLVEncoder.new_parts),
        "language_projector",
    )
    trained_parts = (
        *(f"encoder.{part}" for part in VLVEncoder.trained_parts),
        "language_projector",
        "language_model",
    )

    def __init__(
        self,
        encoder: VLVEncoder,
        text_encoder: TextEncoder | ClipPair,
        language_projector: nn.Module,
        language_model: Qwen2ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        text_encoder.check_queries(encoder.num_queries)
        self.encoder = encoder
        self.text_encoder = text_encoder
        self.language_projector = language_projector
        self.language_model = language_model
        self.tokenizer = tokenizer
        self.lora = Lora()
        rows = language_model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ModelError(
                f"the caption tokenizer has {len(tokenizer)} tokens, the language model {rows}: "
                "take both from one language model"
            )
        # generate() would otherwise use the sampling defaults published with a language model
        # (temperature, repetition penalty, other stop tokens).
        language_model.generation_config = GenerationConfig()
        self.set_trainable("projector+llm+encoder")

    @property
    def base_parts(self) -> tuple[str, ...]:
        """The pretrained parts with weights that its training depends on."""
        return ("florence", *self.text_encoder.pretrained_parts, "language_model")

    @classmethod
    def from_pretrained(
        cls,
        model: loading.Model | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        for_training: bool = False,
        lora: Lora | None = None,
        precision: Precision = "float32",
        verify: bool = True,
        **parts: Any,
    ) -> VLVCaptioner:
        """Build from pretrained parts (no denoiser, no VAE), then load trained weights strictly.

        `model` is a ModelConfig, a folder with model.json, or a checkpoint folder; `parts` are
        fields of ModelConfig that override it. A stage-2 checkpoint loads its stage-1 parent
        too. A stage-1 checkpoint leaves the language projector random, which is an error unless
        `for_training`. Saved adapters (LoRA) are merged unless `for_training`; `lora` adds new ones
        where the checkpoint has none. Returned in `precision`, on the CPU, in eval mode.
        `verify=False` skips the digest checks. Raises ModelError or CheckpointError.
        """
        config, checkpoint = loading.resolve_checkpoint(model, checkpoint, parts)
        saved = Lora() if checkpoint is None else read_checkpoint(checkpoint).lora
        merges = bool(saved.rank) and not for_training
        load_precision: Precision = "float32" if merges else precision  # merge, then round
        encoder = VLVEncoder.from_pretrained(config, precision=load_precision)
        text_encoder = loading.load_text_encoders(config, load_precision)
        language_model = loading.load_language_model(config, load_precision)
        language_projector = build_language_projector(
            text_encoder.width, language_model.config.hidden_size, config.projector_seed
        )
        tokenizer = loading.load_caption_tokenizer(config)
        captioner = cls(encoder, text_encoder, language_projector, language_model, tokenizer)
        if saved.rank or (lora and lora.rank):
            captioner.add_adapters(saved if saved.rank or not lora else lora, config.projector_seed)
        if checkpoint is not None:
            untrained = ("language_projector",) if for_training else ()
            load_checkpoint(
                checkpoint, captioner, model=config, may_be_untrained=untrained, verify=verify
            )
        if merges:
            captioner.merge_adapters()
        return cast(captioner, precision).eval()

    def set_trainable(self, trainable: Trainable) -> None:
        """Choose what stage 2 trains; `encoder` means Florence-2's language model.

        Queries, caption projector and text encoder keep their stage-1 weights. Parts that are not
        trained are frozen and stay in eval mode. Raises ModelError for another value.
        """
        if trainable not in get_args(Trainable):
            raise ModelError(
                f"trainable is '{trainable}', expected one of {', '.join(get_args(Trainable))}"
            )
        self.encoder.set_trainable(language_model=trainable.endswith("+encoder"), queries=False)
        thaw(self.language_projector)
        (thaw if "+llm" in trainable else freeze)(self.language_model)
        if "+llm" in trainable:
            # Not `freeze`: its train() does nothing, and the adapters' dropout would stay in eval
            # mode.
            train_only_adapters(self.language_model)

    def add_adapters(self, lora: Lora, seed: int) -> None:
        """Train adapters (LoRA) instead of the language model; new ones do not change its output."""
        add_adapters(self.language_model, lora, seed)
        self.lora = lora

    def merge_adapters(self) -> None:
        """Add the adapters to the language model's weights and remove them."""
        merge_adapters(self.language_model)
        self.lora = Lora()
        self.set_trainable("projector+llm+encoder")

    @overload
    def caption(  # type: ignore[overload-overlap]  # a str is a sequence too
        self,
        images: Picture,
        *,
        num_beams: int = ...,
        max_new_tokens: int = ...,
        batch_size: int = ...,
    ) -> str: ...

    @overload
    def caption(
        self,
        images: Sequence[Picture],
        *,
        num_beams: int = ...,
        max_new_tokens: int = ...,
        batch_size: int = ...,
    ) -> list[str]: ...

    def caption(
        self,
        images: Picture | Sequence[Picture],
        *,
        num_beams: int = 4,
        max_new_tokens: int = 300,
        batch_size: int = 8,
    ) -> str | list[str]:
        """The caption of an image file or a Pillow image; for a list of them, a list of captions.

        Images are prepared as the jobs do it (`Square.open`), and captioned by beam search
        (one beam: greedy) in batches. Raises DataError for what is not an image.
        """
        if isinstance(images, str | os.PathLike | Image.Image):
            return self.caption([images], num_beams=num_beams, max_new_tokens=max_new_tokens)[0]
        captions: list[str] = []
        for first in range(0, len(images), batch_size):
            squares = [
                self.encoder.square.open(image) for image in images[first : first + batch_size]
            ]
            pixels = torch.from_numpy(np.stack(squares))  # uint8 [b 3 s s]
            made = self.generate(pixels.to(self.language_model.device), num_beams, max_new_tokens)
            captions += [caption.text for caption in made]
        return captions

    def tokenize(self, captions: Sequence[str], max_tokens: int = 300) -> dict[str, Tensor]:
        """Captions -> `input_ids attention_mask labels` `[b n]`; see `tokenize_captions`."""
        return tokenize_captions(self.tokenizer, captions, max_tokens)

    def clip_embeddings(self, pixel_values: Tensor) -> Tensor:
        """uint8 squares `[b 3 s s]` or float encoder pixels `[b 3 e e]` -> `[b q d]`."""
        return self.text_encoder(self.encoder(pixel_values))

    def prefix(self, pixel_values: Tensor) -> Tensor:
        """The language model's prefix: squares or pixels as in `clip_embeddings` -> `[b q h]`."""
        dtype = next(self.language_projector.parameters()).dtype
        prefix = self.language_projector(self.clip_embeddings(pixel_values).to(dtype))
        return prefix.to(self.language_model.dtype)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        *,
        num_label_tokens: Tensor | int | None = None,
        encoder_pixel_values: Tensor | None = None,
    ) -> Tensor:
        """Stage-2 loss, a float32 scalar: summed cross-entropy / `num_label_tokens`.

        pixel_values: uint8 `[b 3 s s]`
        input_ids, attention_mask, labels: int64 `[b n]` from `tokenize`, padded at the end
        num_label_tokens: default, this batch's count. In data-parallel training pass the global
            batch's: the mean of the ranks' means is a different number.
        encoder_pixel_values: float `[b 3 e e]`, ImageNet-normalised, skips the preprocessing.
        """
        pixels = pixel_values if encoder_pixel_values is None else encoder_pixel_values
        prefix = self.prefix(pixels)  # [b q h]
        num_queries = prefix.shape[1]
        embeddings = self.language_model.get_input_embeddings()(input_ids)  # [b n h]
        # No attention mask: padding is at the end, where causal attention hides it from every
        # label, and without a mask attention uses its fastest kernel.
        hidden = self.language_model.model(
            inputs_embeds=torch.cat([prefix, embeddings], dim=1),
            use_cache=False,
        ).last_hidden_state  # [b q+n h]
        # Each position predicts the next one; the last query predicts the first caption token. With
        # a vocabulary of 150,000 logits are expensive: only those with a label are computed.
        is_label = labels != IGNORED
        logits = self.language_model.lm_head(hidden[:, num_queries - 1 : -1][is_label])  # [l v]
        total = F.cross_entropy(logits.float(), labels[is_label], reduction="sum")
        return total / (is_label.sum() if num_label_tokens is None else num_label_tokens)

    # DeepSpeed and DDP wrap the module and call forward; elsewhere the name says what it returns.
    loss = forward

    def decoder(
        self, slots: int, max_new_tokens: int, sampling: Sampling | None = None
    ) -> SlotDecoder:
        """A decoder for at most `slots` prefixes at a time: greedy, or with `sampling`."""
        return SlotDecoder(
            self.language_model,
            end_of_text_id(self.tokenizer),
            slots=slots,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )

    def generate(
        self, pixel_values: Tensor, num_beams: int = 1, max_new_tokens: int = 300
    ) -> list[GeneratedCaption]:
        """Captions of uint8 squares `[b 3 s s]` (or float encoder pixels), by beam search.

        One beam is greedy search. Rows are independent: all prefixes have the same length. A
        caption ends with the end-of-text or is cut at `max_new_tokens`, which include it.
        """
        with evaluating(self):
            prefix = self.prefix(pixel_values)
            if num_beams > 1:
                return self.search(prefix, num_beams, max_new_tokens)
            decoder = self.decoder(len(prefix), max_new_tokens)
            sequences = decode(decoder, range(len(prefix)), prefix)
        return [self.caption_of(finished) for finished in sequences]

    def caption_of(self, finished: FinishedSequence) -> GeneratedCaption:
        """A decoded sequence as text."""
        text = caption_text(self.tokenizer, finished.ids)
        return GeneratedCaption(text, len(finished.ids), finished.finish_reason)

    def search(
        self, prefix: Tensor, num_beams: int, max_new_tokens: int, early_stopping: bool = False
    ) -> list[GeneratedCaption]:
        """Captions of prefixes `[b q h]` by transformers' beam search, as one batch.

        With `early_stopping` a row's search ends as soon as `num_beams` captions are complete.
        """
        end_of_text = end_of_text_id(self.tokenizer)
        with torch.no_grad():
            new_ids = self.language_model.generate(
                inputs_embeds=prefix,
                attention_mask=prefix.new_ones(prefix.shape[:2], dtype=torch.int64),
                do_sample=False,
                num_beams=num_beams,
                early_stopping=early_stopping,
                max_new_tokens=max_new_tokens,
                eos_token_id=end_of_text,
                pad_token_id=end_of_text,
            )  # [b n]: the new tokens only, since the prefix came as embeddings
        return decode_captions(self.tokenizer, new_ids)


def build_language_projector(width: int, hidden_size: int, seed: int) -> nn.Sequential:
    """Linear(width->h)-GELU-Linear(h->h), randomly initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(width, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )
