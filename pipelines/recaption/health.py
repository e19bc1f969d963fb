"""What is wrong with a caption, seen from its text alone.

    num_words      words; of scripts that put no spaces between them, characters
    truncated      it ran into `generate.max_new_tokens`, whatever a postprocess made of it
    empty          no word in it
    repetition     share of its words that stand in four words in a row which it said before
    non_language   half of its characters and more are no letters, or it holds what no text has:
                   the character for broken UTF-8, a control character, a word of 40 Latin letters

A caption in any script is language here; whether it is the right one is not looked at.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

REPEATED = 0.35
"""A caption counts as repeated from this `repetition` on. Less is often in order: two objects of one
kind in a short caption (0.29), a phrase that a long one says twice."""

_GRAM = 4  # words
_LETTERS = 0.5  # least share of letters, marks of them and digits among what is not white space
# Han, kana, Thai, Lao, Khmer, Myanmar: each character for itself.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+(?:['’-][^\W{_SPACELESS}]+)*")
_ENDLESS = re.compile(r"[A-Za-z]{40}")


@dataclass(frozen=True)
class Health:
    """Of one caption; see the module's text."""

    num_words: int
    truncated: bool
    empty: bool
    repetition: float
    non_language: bool

    @property
    def repeated(self) -> bool:
        return self.repetition >= REPEATED


def health_of(caption: str, truncated: bool) -> Health:
    """The health of a caption; `truncated` tells whether decoding was cut at its limit."""
    said = words(caption)
    return Health(len(said), truncated, not said, _repetition(said), _is_no_language(caption))


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def _repetition(said: list[str]) -> float:
    seen: set[tuple[str, ...]] = set()
    again = [False] * len(said)
    for start in range(len(said) - _GRAM + 1):
        gram = tuple(said[start : start + _GRAM])
        if gram in seen:
            again[start : start + _GRAM] = [True] * _GRAM
        seen.add(gram)
    return sum(again) / len(said) if said else 0.0


def _is_no_language(text: str) -> bool:
    shown = "".join(text.split())
    if not shown:
        return False  # empty, which is another matter
    kinds = [unicodedata.category(character) for character in shown]
    if "\ufffd" in shown or "Cc" in kinds or _ENDLESS.search(text):
        return True
    letters = sum(kind[0] in "LM" or kind == "Nd" for kind in kinds)
    digits = sum(kind == "Nd" for kind in kinds)
    return letters < _LETTERS * len(shown) or digits > _LETTERS * len(shown)
