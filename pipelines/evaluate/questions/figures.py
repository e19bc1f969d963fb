"""Accuracy of a reader that sees captions alone, beside its floor without any caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipelines.evaluate.config import AskConfig, EvaluateConfig
from pipelines.evaluate.figures import Direction, Figure, Scores, mean_figure
from pipelines.evaluate.questions.reader import OK, ask_all, digest
from pipelines.evaluate.questions.vqa import (
    Question,
    commonest,
    exact_match,
    image_number,
    messages,
    read_questions,
    soft_accuracy,
)
from pipelines.evaluate.subjects import ANSWERS, CaptionTable, Subject
from vlv_model.errors import ConfigError, DataError

FLOOR = "no caption"
FAILED = "questions without an answer"
Request = list[dict[str, str]]


def question_figures(config: EvaluateConfig, subjects: Sequence[Subject]) -> Iterator[Figure]:
    """Exact match and VQA's accuracy of each captioner, and of no caption, by number of shots.

    All answer the same questions: those of images that every captioner has captioned. A question
    without an answer counts as wrong. Raises DataError or ConfigError before the first request.
    """
    ask = config.ask
    questions = _read(ask, "questions", "annotations")
    captioners: dict[str, dict[int, str]] = {}
    for subject in subjects:
        for label, table in subject.captions.items():
            name = subject.name if len(subject.captions) == 1 else f"{subject.name}/{label}"
            captioners[name] = by_image(table)
    if not captioners:
        raise ConfigError("ask.questions needs captions: give a caption table")
    asked = [q for q in questions if all(q.image in captions for captions in captioners.values())]
    if not asked:
        raise DataError(
            "no question of ask.questions is about an image that every caption table has: names of "
            "images end in COCO's number, such as COCO_val2014_000000000042.jpg"
        )
    rng = np.random.default_rng(config.measure.seed)
    if ask.limit is not None and ask.limit < len(asked):
        asked = [asked[i] for i in sorted(rng.choice(len(asked), ask.limit, replace=False))]
    shots = _shots(ask, captioners, rng)
    requests: dict[tuple[str, int], list[Request]] = {}
    for number in ask.shots:
        for name, captions in captioners.items():
            examples = [(captions[q.image], q.text, commonest(q.answers)) for q in shots[:number]]
            requests[name, number] = [messages(q.text, captions[q.image], examples) for q in asked]
        blind: list[tuple[str | None, str, str]] = [
            (None, q.text, commonest(q.answers)) for q in shots[:number]
        ]
        requests[FLOOR, number] = [messages(q.text, None, blind) for q in asked]
    Path(config.output).mkdir(parents=True, exist_ok=True)
    log = Path(config.output) / ANSWERS
    answers = ask_all(ask, [one for group in requests.values() for one in group], log)

    keys = np.array([q.id for q in asked], np.int64)
    for (name, number), group in requests.items():
        found = [answers[digest(ask, request)] for request in group]
        failed = Counter(answer.status for answer in found if answer.status != OK)
        made = {
            "reader": ask.model,
            "endpoint": ask.endpoint,
            "shots": number,
            "shot_questions": [q.id for q in shots[:number]],
            "max_tokens": ask.max_tokens,
            "failed": dict(failed),
        }
        measures = {
            f"exact match, {number} shots": exact_match,
            f"VQA accuracy, {number} shots": soft_accuracy,
        }
        for measure, score in measures.items():
            values = [
                score(answer.text, q.answers) if answer.status == OK else 0.0
                for answer, q in zip(found, asked, strict=True)
            ]
            yield _mean(config, name, measure, keys, values, made)
        if failed:
            lost = [float(answer.status != OK) for answer in found]
            yield _mean(config, name, f"{FAILED}, {number} shots", keys, lost, made)


def _mean(
    config: EvaluateConfig,
    subject: str,
    measure: str,
    keys: np.ndarray,
    values: Sequence[float],
    made: dict[str, object],
) -> Figure:
    better: Direction = "lower" if measure.startswith(FAILED) else "higher"
    seed, resamples = config.measure.seed, config.measure.resamples
    scores = Scores.of(keys, np.array(values))
    return mean_figure(subject, "", measure, scores, better, seed, resamples, made)


def by_image(table: CaptionTable) -> dict[int, str]:
    """Captions by the number at the end of the image's file name."""
    found: dict[int, str] = {}
    for name, caption in table.named_captions():
        number = image_number(name)
        if number is not None:
            found.setdefault(number, caption)
    return found


def _shots(
    ask: AskConfig, captioners: dict[str, dict[int, str]], rng: np.random.Generator
) -> list[Question]:
    most = max(ask.shots, default=0)
    if not most:
        return []
    if ask.shot_questions is None:
        raise ConfigError(
            f"ask.shots={max(ask.shots)} needs ask.shot_questions and ask.shot_annotations: questions "
            "of the train split, whose images are captioned in the same tables"
        )
    known = [
        q
        for q in _read(ask, "shot_questions", "shot_annotations")
        if all(q.image in captions for captions in captioners.values())
    ]
    if len(known) < most:
        raise DataError(
            f"ask.shots={most}: {len(known)} questions of ask.shot_questions are about images that "
            "every caption table has: caption images of the train split too"
        )
    return [known[i] for i in rng.choice(len(known), most, replace=False)]


def _read(ask: AskConfig, questions: str, annotations: str) -> list[Question]:
    paths = getattr(ask, questions), getattr(ask, annotations)
    if paths[0] is None or paths[1] is None:
        raise ConfigError(f"ask.{questions} and ask.{annotations} belong together: give both")
    return read_questions(*paths)
