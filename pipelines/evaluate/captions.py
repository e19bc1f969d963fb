"""Figures of captions: length, CLIP score, and BLEU and CIDEr-D against references."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluate.config import MeasureConfig
from pipelines.evaluate.figures import Direction, Figure, Scores, keys_hash, mean_figure
from pipelines.evaluate.pictures import paired_cosines, provenance, table_scores
from pipelines.evaluate.subjects import CaptionTable, read_captions
from pipelines.evaluate.texts import TOKENIZER, Bleu, CiderD, sentences
from pipelines.images.features import FeatureTable
from pipelines.recaption.health import words
from pipelines.storage.tables import parquet_files
from vlv_model.errors import DataError

CLIP_SCORE = "CLIP score"
SEEN = "share of the caption that CLIP sees"
CIDER = "CIDEr-D"


def read_references(path: str) -> dict[int, list[str]]:
    """All captions of each key; DataError if there is none."""
    references: dict[int, list[str]] = defaultdict(list)
    for key, caption in read_captions(parquet_files(path, "data.references")):
        if words(caption):
            references[key].append(caption)
    if not references:
        raise DataError(f"data.references={path} has no caption")
    return dict(references)


def caption_figures(
    subject: str,
    label: str,
    table: CaptionTable,
    references: Mapping[int, Sequence[str]] | None,
    measure: MeasureConfig,
) -> Iterator[Figure]:
    """Figures of the text alone; DataError if no caption has a reference."""
    captions = table.captions
    if not captions:
        raise DataError(f"{table.path} has no caption of status ok")
    keys = np.array(list(captions), np.int64)

    def mean(name: str, chosen: np.ndarray, values: Sequence[float], better: Direction) -> Figure:
        scores = Scores.of(chosen, np.array(values, float))
        made = {"tokenizer": TOKENIZER}
        return mean_figure(
            subject, label, name, scores, better, measure.seed, measure.resamples, made
        )

    yield mean("words", keys, [len(words(text)) for text in captions.values()], "")
    yield mean("sentences", keys, [len(sentences(text)) for text in captions.values()], "")
    if references is None:
        return
    common = sorted(captions.keys() & references.keys())
    if not common:
        raise DataError(
            f"{table.path} and data.references have no key in common: keys of both must be those of "
            "the same image list"
        )
    cider = CiderD([references[key] for key in common])
    values = [cider.value(captions[key], references[key]) for key in common]
    yield mean(CIDER, np.array(common, np.int64), values, "higher")
    bleu = Bleu()
    for key in common:
        bleu.add(captions[key], references[key])
    yield Figure(
        subject,
        label,
        "BLEU-4 × 100",
        100 * bleu.value(),
        None,
        None,
        "of the corpus, no smoothing",
        len(common),
        "higher",
        keys_hash(np.array(common)),
        {"tokenizer": TOKENIZER},
    )


def clip_score_figures(
    subject: str, label: str, texts: FeatureTable, images: FeatureTable, measure: MeasureConfig
) -> Iterator[Figure]:
    """100 · cosine of caption and image (Hessel et al. 2021, as torchmetrics scales it), and the share
    of the caption that one window of CLIP holds.

    Raises DataError if the two are not of one CLIP model.
    """
    one, other = (table.extractor.get("weights") for table in (texts, images))
    if one != other:
        raise DataError(
            f"{texts.path} and {images.path} are of different CLIP weights ({one}, {other}): embed "
            "captions and images with the same embed.weights"
        )
    pairs = paired_cosines(texts, images)
    made: dict[str, Any] = provenance(texts, images)
    seed, resamples = measure.seed, measure.resamples
    if len(pairs.keys):
        scores = Scores(pairs.keys, 100 * pairs.values)
        yield mean_figure(subject, label, CLIP_SCORE, scores, "higher", seed, resamples, made)
    if "seen" in texts.scores:
        seen = table_scores(texts, "seen")
        if len(seen.keys):
            yield mean_figure(subject, label, SEEN, seen, "", seed, resamples, made)
