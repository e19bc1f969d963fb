"""BLEU and CIDEr-D against published examples and closed forms."""

import math
from collections import Counter

import pytest

from pipelines.evaluate.texts import Bleu, CiderD, agreement, sentences

# Papineni et al. 2002, examples 1 and 2; the values of the whole are those of NLTK's documentation.
GUIDE = (
    "It is a guide to action which ensures that the military always obeys the commands of the party"
)
GUIDES = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command "
    "of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]
BOOK = "he read the book because he was interested in world history"
BOOKS = ["he was interested in world history because he read the book"]


def test_bleu_of_published_examples() -> None:
    one = Bleu()
    one.add(GUIDE, GUIDES)
    assert one.value() == pytest.approx(0.5045666840058485, abs=1e-12)
    one.add(BOOK, BOOKS)
    assert one.value() == pytest.approx(0.5920778868801042, abs=1e-12)
    clipped = Bleu(1)
    clipped.add(
        "the the the the the the the", ["The cat is on the mat.", "There is a cat on the mat."]
    )
    assert clipped.value() == pytest.approx(2 / 7)
    short = Bleu(1)
    short.add("the cat", ["the cat is on the mat"])
    assert short.value() == pytest.approx(math.exp(1 - 6 / 2))


def test_cider_of_closed_forms() -> None:
    corpus = [["a b c d e"], ["f g h i j"], ["k l m n o"]]
    cider = CiderD(corpus)
    assert cider.value("A b, c d e.", corpus[0]) == pytest.approx(10)
    assert cider.value("p q r s t", corpus[0]) == 0
    # Half of the words: one word of the 1- to 4-grams at equal rarity, and a shorter text.
    expected = 10 / 4 * (3 / math.sqrt(15) + 2 / math.sqrt(8) + 1 / math.sqrt(3))
    assert cider.value("a b c", corpus[0]) == pytest.approx(expected * math.exp(-4 / 72))
    # Words of every image say nothing about one.
    assert CiderD([["a"], ["a"]]).value("a", ["a"]) == 0


def test_cider_is_a_second_plain_implementation() -> None:
    corpus = [
        ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping"],
        ["rain is falling hard on a surface"],
        ["rain falls on a man", "it rains and rains"],
    ]
    candidates = ["a man is speaking", "rain falls", "rain rain on a man and a man"]
    for caption, references in zip(candidates, corpus, strict=True):
        assert CiderD(corpus).value(caption, references) == pytest.approx(
            plain_cider(caption, references, corpus), rel=1e-12
        )


def plain_cider(caption: str, references: list[str], corpus: list[list[str]]) -> float:
    def grams(text: str, n: int) -> Counter[str]:
        tokens = text.replace(".", "").split()
        return Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    scores = []
    for n in (1, 2, 3, 4):
        for reference in references:
            c, r = grams(caption, n), grams(reference, n)
            idf = {
                g: math.log(
                    len(corpus) / max(1, sum(any(grams(t, n)[g] for t in ts) for ts in corpus))
                )
                for g in {*c, *r}
            }
            dot = sum(min(c[g], r[g]) * r[g] * idf[g] ** 2 for g in c)
            norms = math.prod(math.sqrt(sum((k[g] * idf[g]) ** 2 for g in k)) for k in (c, r))
            gap = sum(grams(caption, 2).values()) - sum(grams(reference, 2).values())
            scores.append(math.exp(-(gap**2) / 72) * dot / norms if norms else 0)
    return 10 * sum(scores) / len(scores)


def test_sentences() -> None:
    text = 'A dog, e.g. a 4.5 kg one, runs. "It is brown." Is it? Yes!\nThe sky (above.) is blue'
    assert sentences(text) == [
        "A dog, e.g. a 4.5 kg one, runs.",
        '"It is brown."',
        "Is it?",
        "Yes!",
        "The sky (above.) is blue",
    ]
    assert sentences("狗在跑。天是蓝的。") == ["狗在跑。", "天是蓝的。"]
    assert sentences(" ... ") == []


def test_agreement() -> None:
    assert agreement("A red dog.", "a red cat") == pytest.approx(2 / 3)
    assert (agreement("", "."), agreement("", "a")) == (1, 0)
