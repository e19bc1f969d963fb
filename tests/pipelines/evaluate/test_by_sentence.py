"""CLIP scores by sentence, by a tiny random CLIP."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from pipelines.evaluate.by_sentence import LONG, MEAN, WORST, SentenceScores
from pipelines.evaluate.config import ClipConfig, MeasureConfig
from pipelines.evaluate.texts import sentences
from pipelines.images.features import FeatureTable
from tests.pipelines.evaluate.test_job import write_features
from tests.tiny_extractors import write_clip
from vlv_model.errors import DataError
from vlv_model.features.extractors import load_extractor
from vlv_model.features.settings import ExtractorConfig

KEYS = np.array([5, -3, 8, 11])
CAPTIONS = {
    5: "A red dog. It runs on the grass! Is it a big one?",
    8: "a cat " * 60 + ". A dog.",
    11: " . ",
    99: "Of no image.",
}


def test_each_sentence_is_scored_by_itself(tiny_models: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip", tiny_models / "diffusion/tokenizer")
    weights = load_extractor(ExtractorConfig(extractor="clip-text", weights=clip)).identity[
        "weights"
    ]
    width = CLIPModel.from_pretrained(clip).config.projection_dim
    features = np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)
    write_features(tmp_path / "t", features, {"extractor": "clip", "weights": weights}, KEYS)
    images = FeatureTable(str(tmp_path / "t"))
    scores = SentenceScores(ClipConfig(weights=clip, batch_size=2), images)
    figures = {f.measure: f for f in scores.figures("a", "", CAPTIONS, MeasureConfig())}

    window = CLIPModel.from_pretrained(clip).config.text_config.max_position_embeddings
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    for place, key in ((0, 5), (2, 8)):  # of the sorted keys, 5 and 8
        cosines = []
        for text in sentences(CAPTIONS[key]):
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=window)
            with torch.inference_mode():
                found = model.get_text_features(**ids)
            vector = getattr(found, "pooler_output", found)[0]
            cosines.append(float(torch.cosine_similarity(vector, torch.tensor(features[place]), 0)))
        at = {5: 0, 8: 1}[key]
        for name, value in ((MEAN, np.mean(cosines)), (WORST, min(cosines))):
            assert figures[name].scores.keys.tolist() == [5, 8]
            assert figures[name].scores.values[at] == pytest.approx(100 * value, abs=1e-3)
    assert figures[LONG].scores.values.tolist() == [0, 0.5]
    assert figures[MEAN].made["text"]["weights"] == weights

    write_features(tmp_path / "u", features, {"extractor": "clip", "weights": "other"}, KEYS)
    with pytest.raises(DataError, match=r"are not those of .* \(other\): give the weights"):
        SentenceScores(ClipConfig(weights=clip), FeatureTable(str(tmp_path / "u")))
