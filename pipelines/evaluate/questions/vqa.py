"""VQAv2 and OK-VQA as published: files, prompts, and both scores of an answer.

Yes/no sets have the same two files. The prompt has the parts of De-Diffusion's (Wei et al. 2023), in our
words, so figures are near a paper's and not the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.storage.files import as_path, read_bytes
from vlv_model.errors import DataError

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_PUNCTUATION = re.compile(r"(?<=\d),(?=\d)|[^\w\s.:'’-]|(?<!\d)[.:]|[.:](?!\d)|['’]")


@dataclass(frozen=True)
class Question:
    """One question, and the answers of its annotators."""

    id: int
    image: int  # COCO's id
    text: str
    answers: tuple[str, ...]


def read_questions(questions: str, annotations: str) -> list[Question]:
    """The questions of two published files; DataError if one is not of that form."""
    try:
        asked = _rows(questions, "questions")
        answered = {int(row["question_id"]): row for row in _rows(annotations, "annotations")}
        found = [
            Question(
                int(row["question_id"]),
                int(row["image_id"]),
                str(row["question"]),
                tuple(str(a["answer"]) for a in answered[int(row["question_id"])]["answers"]),
            )
            for row in asked
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{questions} and {annotations} are not VQA's files: expected lists 'questions' and "
            f"'annotations' with question_id, image_id, question and answers ({error!r})"
        ) from None
    if not found or not all(question.answers for question in found):
        raise DataError(f"{questions} has no question, or one without an answer in {annotations}")
    return found


def image_number(name: str) -> int | None:
    """COCO's image id in a file name, the number at its end: COCO_val2014_000000000042.jpg -> 42."""
    number = re.search(r"(\d+)(\.\w+)?$", name.rpartition("/")[2])
    return int(number[1]) if number else None


def normalised_answer(answer: str) -> str:
    """As VQA compares answers: lower case, no articles and punctuation, numbers as digits."""
    tokens = _PUNCTUATION.sub("", answer.lower().replace("-", " ")).split()
    return " ".join(_NUMBERS.get(token, token) for token in tokens if token not in _ARTICLES)


def exact_match(answer: str, answers: Sequence[str]) -> float:
    """1 if any annotator gave this answer: the score of the VLV paper."""
    return float(normalised_answer(answer) in map(normalised_answer, answers))


def soft_accuracy(answer: str, answers: Sequence[str]) -> float:
    """VQA's accuracy: min(1, equal answers / 3), averaged over leaving each annotator out."""
    ours = normalised_answer(answer)
    equal = [normalised_answer(other) == ours for other in answers]
    if len(equal) < 4:  # no set of ten annotators: one is enough
        return float(any(equal))
    total = sum(equal)
    return sum(min(1.0, (total - one) / 3) for one in equal) / len(equal)


def messages(
    question: str, caption: str | None, shots: Sequence[tuple[str | None, str, str]]
) -> list[dict[str, str]]:
    """The request of one question; `shots` are caption, question and answer. No caption: the floor."""

    def block(context: str | None, asked: str, answer: str) -> str:
        lines = [] if context is None else [f"Image context: {context}"]
        return "\n".join([*lines, f"Question: {asked}", f"Short answer:{answer}"])

    task = "Answer the question about an image" + ("" if caption is None else " from its context")
    rule = f"{task}. Give only the answer, in one word or a short phrase, and always give one."
    blocks = [block(context, asked, f" {answer}") for context, asked, answer in shots]
    return [{"role": "user", "content": "\n\n".join([rule, *blocks, block(caption, question, "")])}]


def commonest(answers: Sequence[str]) -> str:
    """The answer of most annotators, the first of equals, as a shot shows it."""
    normal = [normalised_answer(answer) for answer in answers]
    return max(answers, key=lambda answer: normal.count(normalised_answer(answer)))


def _rows(path: str, name: str) -> list[Mapping[str, Any]]:
    try:
        content = json.loads(read_bytes(as_path(path)))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None
    rows: list[Mapping[str, Any]] = content[name]
    return rows
