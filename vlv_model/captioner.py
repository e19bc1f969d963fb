"""The VLV captioner (stage 2): CLIP embeddings become the prefix of a language model.

(arXiv 2507.07104, stage 2)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
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
from vlv_model.config import Lora, Precision, Trainable
from vlv_model.decoding import Finished, Sampling, SlotDecoder, decode
from vlv_model.encoder import VLVEncoder
from vlv_model.errors import ModelError
from vlv_model.freezing import evaluating, freeze, thaw
from vlv_model.lora import add_adapters, merge_adapters, train_adapters_alone
from vlv_model.precision import cast
from vlv_model.text_encoder import TextEncoder


class VLVCaptioner(nn.Module):
    """Encoder, frozen text encoder, language projector and caption decoder (Qwen2.5)."""

    base_parts = ("florence", "text_encoder", "language_model")  # with weights
    read_parts = (*base_parts, "tokenizer")  # all that from_pretrained reads
    passed_over = ()  # it has all that a checkpoint holds
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
        text_encoder: TextEncoder,
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
        # Sampling defaults published with a language model (temperature, repetition penalty,
        # other stop tokens) would otherwise join every call of generate.
        language_model.generation_config = GenerationConfig()
        self.set_trainable("projector+llm+encoder")

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
        """Build from pretrained parts (no UNet, no VAE), then load trained weights strictly.

        `model` is a ModelConfig, a folder with model.json, or a checkpoint's folder; `parts` are
        fields of ModelConfig that win over it. A stage-2 checkpoint brings its stage-1 parent
        along. A stage-1 checkpoint leaves the language projector random, which is refused unless
        `for_training`; so are adapters merged unless they are to be trained on. `lora` gives new
        ones to a language model without any. In `precision`, on the CPU, in eval mode. Without
        `verify` digests are not looked at. Raises ModelError or CheckpointError.
        """
        config, checkpoint = loading.resolve_checkpoint(model, checkpoint, parts)
        saved = Lora() if checkpoint is None else read_checkpoint(checkpoint).lora
        merges = bool(saved.rank) and not for_training
        at_first: Precision = "float32" if merges else precision  # adapters are added up unrounded
        encoder = VLVEncoder.from_pretrained(config, precision=at_first)
        text_encoder = TextEncoder(
            *loading.load_text_encoder(config, at_first), bottleneck=config.bottleneck
        )
        language_model = loading.load_language_model(config, at_first)
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

        Queries, caption projector and text encoder stay as stage 1 left them. What is not trained
        is frozen and held in eval mode.
        """
        if trainable not in get_args(Trainable):
            raise ModelError(
                f"trainable is '{trainable}', expected one of {', '.join(get_args(Trainable))}"
            )
        self.encoder.set_trainable(language_model=trainable.endswith("+encoder"), queries=False)
        thaw(self.language_projector)
        (thaw if "+llm" in trainable else freeze)(self.language_model)
        if "+llm" in trainable:
            # In train mode as a whole: a frozen part would not pass it on to the adapters' dropout.
            train_adapters_alone(self.language_model)

    def add_adapters(self, lora: Lora, seed: int) -> None:
        """Have adapters trained in the language model's place; at first they change nothing."""
        add_adapters(self.language_model, lora, seed)
        self.lora = lora

    def merge_adapters(self) -> None:
        """Make the language model a plain one again, with what its adapters have learned."""
        merge_adapters(self.language_model)
        self.lora = Lora()
        self.set_trainable("projector+llm+encoder")

    def tokenize(self, captions: Sequence[str], max_tokens: int = 300) -> dict[str, Tensor]:
        """Captions -> `input_ids attention_mask labels` `[b n]`; see `tokenize_captions`."""
        return tokenize_captions(self.tokenizer, captions, max_tokens)

    def clip_embeddings(self, pixel_values: Tensor) -> Tensor:
        """uint8 squares `[b 3 s s]` or float encoder pixels `[b 3 e e]` -> `[b q d]`."""
        return self.text_encoder(self.encoder(pixel_values))

    def prefix(self, pixel_values: Tensor) -> Tensor:
        """uint8 squares `[b 3 s s]` or float encoder pixels `[b 3 e e]` -> `[b q h]`."""
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

        pixel_values uint8 `[b 3 s s]` · input_ids, attention_mask, labels int64 `[b n]` as
        `tokenize` makes them, padded at the end · encoder_pixel_values float `[b 3 e e]` spares the preprocessing.
        num_label_tokens is this batch's own count unless given: in data-parallel training give
        the global batch's, since the mean of the ranks' means is another number.
        """
        pixels = pixel_values if encoder_pixel_values is None else encoder_pixel_values
        prefix = self.prefix(pixels)  # [b q h]
        num_queries = prefix.shape[1]
        embeddings = self.language_model.get_input_embeddings()(input_ids)  # [b n h]
        # Without the mask: padding stands at the end, where causal attention sees none of it from
        # a label's place, and no mask lets attention take its fastest kernel.
        hidden = self.language_model.model(
            inputs_embeds=torch.cat([prefix, embeddings], dim=1),
            use_cache=False,
        ).last_hidden_state  # [b q+n h]
        # Each position predicts the next: the last query's the first caption token. A vocabulary
        # of 150,000 makes logits dear, so they are taken where there is a label only.
        is_label = labels != IGNORED
        logits = self.language_model.lm_head(hidden[:, num_queries - 1 : -1][is_label])  # [l v]
        total = F.cross_entropy(logits.float(), labels[is_label], reduction="sum")
        return total / (is_label.sum() if num_label_tokens is None else num_label_tokens)

    # An engine that wraps the module calls forward; everybody else reads better with a name.
    loss = forward

    def decoder(
        self, slots: int, max_new_tokens: int, sampling: Sampling | None = None
    ) -> SlotDecoder:
        """What decodes prefixes greedily, or by `sampling`, at most `slots` at a time."""
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

        One beam is greedy search. Rows do not see each other: all prefixes are equally long. A
        caption ends at `end_of_text_id`, or is cut at `max_new_tokens`, which count it too.
        """
        with evaluating(self):
            prefix = self.prefix(pixel_values)
            if num_beams > 1:
                return self.search(prefix, num_beams, max_new_tokens)
            found = decode(self.decoder(len(prefix), max_new_tokens), range(len(prefix)), prefix)
        return [self.caption_of(finished) for finished in found]

    def caption_of(self, finished: Finished) -> GeneratedCaption:
        """A decoded sequence as text."""
        text = caption_text(self.tokenizer, finished.ids)
        return GeneratedCaption(text, len(finished.ids), finished.finish_reason)

    def search(
        self, prefix: Tensor, num_beams: int, max_new_tokens: int, early_stopping: bool = False
    ) -> list[GeneratedCaption]:
        """Captions of prefixes `[b q h]` by transformers' beam search, all of them at once.

        `early_stopping` ends a search when `num_beams` captions have ended.
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
