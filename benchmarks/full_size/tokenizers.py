"""Tokenizers of our own with the sizes and special ids of the published ones.

They know the words of drawn scenes and single bytes. All other ids of the published vocabulary exist
too, as invented words that no text contains, so that every id a model writes has a text.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from vlv_model.tiny import SCENE_WORDS, spaced_words, vocabulary, word_merges

TEXT_POSITIONS = 77
_LOCATIONS = 1000
_SPACE = "Ġ"  # a leading space in byte-level vocabularies


def florence_tokenizer() -> RobertaTokenizer:
    """51,289 tokens: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> 50264, then locations and others."""
    merges = word_merges(spaced_words())
    vocab = vocabulary(["<s>", "<pad>", "</s>", "<unk>", *_alphabet()], merges)
    tokenizer = RobertaTokenizer(vocab=_filled(vocab, 50_264) | {"<mask>": 50_264}, merges=merges)
    added = [f"<loc_{i}>" for i in range(_LOCATIONS)] + [f"<task_{i}>" for i in range(24)]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """49,408 tokens: padding `!` 0, <|startoftext|> 49406, <|endoftext|> 49407."""
    merges = word_merges([word.lower() for word in SCENE_WORDS], end_of_word="</w>")
    alphabet = _alphabet()
    vocab = vocabulary([*alphabet, *(f"{byte}</w>" for byte in alphabet)], merges)
    vocab = _filled(vocab, 49_406, start="", end="</w>")
    vocab |= {"<|startoftext|>": 49_406, "<|endoftext|>": 49_407}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_POSITIONS, pad_token="!")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """151,665 tokens: <|endoftext|> 151643 (also the padding), <|im_start|>, <|im_end|>, others."""
    merges = word_merges(spaced_words())
    vocab = _filled(vocabulary(_alphabet(), merges), 151_643)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    added = ["<|im_start|>", "<|im_end|>", *(f"<|control_{i}|>" for i in range(19))]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    return tokenizer


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _filled(vocab: dict[str, int], size: int, start: str = _SPACE, end: str = "") -> dict[str, int]:
    """`vocab` and invented words up to `size` tokens."""
    return vocab | {f"{start}word{i}{end}": i for i in range(len(vocab), size)}
