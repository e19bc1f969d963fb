"""Faults of a caption that its text alone shows.

    num_words      words; in scripts without spaces between words, characters
    truncated      decoding reached `generate.max_new_tokens`, before any postprocess
    empty          no word
    repetition     share of its words in a run of four words that occurred earlier in the caption
    non_language   less than half of its characters are letters, or it has a replacement character,
                   a control character or a word of 40 Latin letters

Any script counts as language; whether it is the right language is not checked.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

REPEATED = 0.35
"""The least `repetition` of a repeated caption. Good captions reach 0.29: two objects of one kind in a
short caption, or a phrase that occurs twice in a long one."""

_GRAM = 4  # words
_LETTERS = 0.5  # least share of letters, marks and digits among non-space characters
# Han, kana, Thai, Lao, Khmer, Myanmar: each character counts as a word.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+(?:['’-][^\W{_SPACELESS}]+)*")
_ENDLESS = re.compile(r"[A-Za-z]{40}")


@dataclass(frozen=True)
class Health:
    """The faults of one caption; see the module docstring."""

    num_words: int
    truncated: bool
    empty: bool
    repetition: float
    non_language: bool

    @property
    def repeated(self) -> bool:
        return self.repetition >= REPEATED


def health_of(caption: str, truncated: bool) -> Health:
    """The health of a caption; `truncated`: decoding reached its limit."""
    tokens = words(caption)
    return Health(
        len(tokens), truncated, not tokens, _repetition(tokens), _is_non_language(caption)
    )


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def _repetition(tokens: list[str]) -> float:
    seen: set[tuple[str, ...]] = set()
    repeated = [False] * len(tokens)
    for start in range(len(tokens) - _GRAM + 1):
        gram = tuple(tokens[start : start + _GRAM])
        if gram in seen:
            repeated[start : start + _GRAM] = [True] * _GRAM
        seen.add(gram)
    return sum(repeated) / len(tokens) if tokens else 0.0


def _is_non_language(text: str) -> bool:
    characters = "".join(text.split())
    if not characters:
        return False  # counts as empty instead
    categories = [unicodedata.category(character) for character in characters]
    if "\ufffd" in characters or "Cc" in categories or _ENDLESS.search(text):
        return True
    letters = sum(category[0] in "LM" or category == "Nd" for category in categories)
    digits = sum(category == "Nd" for category in categories)
    return letters < _LETTERS * len(characters) or digits > _LETTERS * len(characters)
