"""CLIP score of each sentence of a caption: CLIP's window holds 77 tokens, and a caption of three
hundred is judged by its beginning otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from pipelines.evaluate.config import ClipConfig, MeasureConfig
from pipelines.evaluate.figures import Direction, Figure, Scores, mean_figure
from pipelines.evaluate.kernels import normalised
from pipelines.evaluate.pictures import provenance
from pipelines.evaluate.texts import sentences
from pipelines.images.features import FeatureTable
from vlv_model.errors import DataError
from vlv_model.features.extractors import load_extractor, pinned
from vlv_model.features.settings import ExtractorConfig

MEAN, WORST = "CLIP score, by sentence", "CLIP score of the worst sentence"
LONG = "share of sentences that CLIP cuts"


class SentenceScores:
    """Scores captions, sentence by sentence, against the CLIP features of their images."""

    def __init__(self, clip: ClipConfig, images: FeatureTable) -> None:
        """Raises ModelError without the weights, DataError if they are not those of `images`."""
        settings = pinned(
            ExtractorConfig(extractor="clip-text", weights=clip.weights, precision=clip.precision)
        )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._extractor = load_extractor(settings).to(self._device)
        self._batch_size, self._images = clip.batch_size, images
        self.identity = {**self._extractor.identity, "precision": clip.precision}
        ours, theirs = self._extractor.identity["weights"], images.extractor.get("weights")
        if ours != theirs:
            raise DataError(
                f"clip.weights={clip.weights} ({ours}) are not those of {images.path} ({theirs}): give "
                "the weights that embedded the images"
            )

    def figures(
        self, subject: str, label: str, captions: Mapping[int, str], measure: MeasureConfig
    ) -> Iterator[Figure]:
        """Mean and worst sentence of each caption; memory holds the sentences of a batch of images."""
        keys: list[int] = []
        means: list[float] = []
        worst: list[float] = []
        cut: list[float] = []
        for batch in self._images.batches(1024):
            chosen = [i for i, key in enumerate(batch.keys.tolist()) if key in captions]
            parts = [sentences(captions[int(batch.keys[i])]) for i in chosen]
            vectors, seen = self._embed([text for part in parts for text in part])
            start = 0
            for i, part in zip(chosen, parts, strict=True):
                if not part:  # a caption without a word has no sentence to score
                    continue
                end = start + len(part)
                cosines = vectors[start:end] @ normalised(batch.features[i : i + 1])[0]
                keys.append(int(batch.keys[i]))
                means.append(100 * float(cosines.mean()))
                worst.append(100 * float(cosines.min()))
                cut.append(float((seen[start:end] < 1).mean()))
                start = end
        if not keys:
            return
        made = {**provenance(self._images), "text": self.identity}
        for name, values in ((MEAN, means), (WORST, worst), (LONG, cut)):
            scores = Scores.of(np.array(keys, np.int64), np.array(values))
            better: Direction = "" if name == LONG else "higher"
            yield mean_figure(
                subject, label, name, scores, better, measure.seed, measure.resamples, made
            )

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Normalised embeddings `[n d]` of texts, and the share of each that the window holds `[n]`."""
        vectors, seen = [np.zeros((0, self._images.width or 0))], [np.zeros(0)]
        # Neighbours in length share a batch, so little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self._batch_size):
            described = self._extractor.describe(
                [texts[i] for i in order[start : start + self._batch_size]]
            )
            vectors.append(normalised(described["features"].float().cpu().numpy()))
            seen.append(described["seen"].cpu().numpy())
        places = np.argsort(np.array(order, np.int64), kind="stable")
        return np.concatenate(vectors)[places], np.concatenate(seen)[places]
