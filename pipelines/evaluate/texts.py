"""BLEU, CIDEr-D, sentences, and how much two captions agree: plain text, without a model or Java.

The tokenizer is `pipelines.recaption.health.words`: NFC, case folded, words of letters and digits,
punctuation dropped. Published figures use the Penn Treebank tokenizer (Java), which also drops
punctuation but splits "don't" in two, so a figure is compared with ours, not with a paper's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from pipelines.recaption.health import words

TOKENIZER = "NFC, case folded, words of letters and digits, no punctuation"
MAX_GRAM = 4
_SIGMA = 6.0  # of CIDEr-D's penalty for another length
Gram = tuple[str, ...]

# A full stop within a number or before a small letter ends nothing ("4.5", "e.g. a dog").
_SENTENCE_END = re.compile(r"""([.!?…]["'”’)\]]*)\s+(?=[^a-z\s])|([。！？])""")


def sentences(caption: str) -> list[str]:
    """The sentences of a caption that have a word; [] if there is none."""
    lines = _SENTENCE_END.sub(r"\1\2\n", caption).split("\n")
    return [line.strip() for line in lines if words(line)]


class Bleu:
    """Corpus BLEU (Papineni et al. 2002): brevity by the closest reference, no smoothing."""

    def __init__(self, most: int = MAX_GRAM) -> None:
        self.matches, self.possible = [0] * most, [0] * most
        self.length = self.reference_length = 0

    def add(self, caption: str, references: Sequence[str]) -> None:
        """Add a caption with one reference or more."""
        tokens, others = words(caption), [words(reference) for reference in references]
        self.length += len(tokens)
        self.reference_length += min(
            (abs(len(other) - len(tokens)), len(other)) for other in others
        )[1]
        for n in range(len(self.matches)):
            counts = Counter(_grams(tokens, n + 1))
            most: Counter[Gram] = Counter()
            for other in others:
                most |= Counter(_grams(other, n + 1))
            self.matches[n] += sum((counts & most).values())
            self.possible[n] += sum(counts.values())

    def value(self) -> float:
        """From 0 to 1; 0 if an order has no match."""
        if not self.length or not all(self.matches):
            return 0.0
        pairs = zip(self.matches, self.possible, strict=True)
        precision = sum(math.log(found / possible) for found, possible in pairs)
        brevity = min(0.0, 1 - self.reference_length / self.length)
        return math.exp(brevity + precision / len(self.matches))


class CiderD:
    """CIDEr-D (Vedantam et al. 2015), from 0 to 10: tf-idf of one to four words, clipped, with a
    penalty for another length. Document frequencies are those of the references given here.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """`references`: those of each image of the corpus, one or more."""
        self._frequency: Counter[Gram] = Counter()
        for texts in references:
            self._frequency.update({gram for text in texts for gram in _counts(words(text))})
        self._images = math.log(max(1, len(references)))

    def value(self, caption: str, references: Sequence[str]) -> float:
        """Of one caption of an image of the corpus."""
        counts = _counts(words(caption))
        total = 0.0
        for reference in references:
            other = _counts(words(reference))
            difference = _bigrams(counts) - _bigrams(other)
            penalty = math.exp(-(difference**2) / (2 * _SIGMA**2))
            total += penalty * sum(
                self._similarity(counts, other, n) for n in range(1, MAX_GRAM + 1)
            )
        return 10 * total / (MAX_GRAM * len(references))

    def _similarity(self, counts: Counter[Gram], other: Counter[Gram], n: int) -> float:
        ours, theirs = (
            {gram: times * self._rarity(gram) for gram, times in c.items() if len(gram) == n}
            for c in (counts, other)
        )
        lengths = math.sqrt(sum(v * v for v in ours.values()) * sum(v * v for v in theirs.values()))
        shared = sum(
            min(v, theirs[gram]) * theirs[gram] for gram, v in ours.items() if gram in theirs
        )
        return shared / lengths if lengths else 0.0

    def _rarity(self, gram: Gram) -> float:
        return self._images - math.log(max(1, self._frequency[gram]))


def agreement(first: str, second: str) -> float:
    """F1 of the words that two captions share, each as often as it stands; 1 if neither has a word."""
    one, other = Counter(words(first)), Counter(words(second))
    total = sum(one.values()) + sum(other.values())
    return 2 * sum((one & other).values()) / total if total else 1.0


def _grams(tokens: Sequence[str], n: int) -> Iterator[Gram]:
    return (tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _counts(tokens: Sequence[str]) -> Counter[Gram]:
    return Counter(gram for n in range(1, MAX_GRAM + 1) for gram in _grams(tokens, n))


def _bigrams(counts: Counter[Gram]) -> int:
    """CIDEr-D's length of a text: its pairs of neighbouring words."""
    return sum(times for gram, times in counts.items() if len(gram) == 2)
