"""Cleaning of captions that never stop."""

import pytest

from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.job import recaption
from pipelines.recaption.postprocess import reference
from pipelines.storage.parquet import read_rows
from pipelines.storage.tables import parquet_files


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A dog. It sleeps. And the", "A dog. It sleeps."),
        ("A dog.", "A dog."),
        ("a dog without any", "a dog without any"),
        ("", ""),
        ("A cat. A dog. a  CAT. A dog. A bird.", "A cat. A dog. A bird."),
        ("It is 3.5 metres long. It has 2.5", "It is 3.5 metres long."),
        ('A sign says "Stop." Nobody stops.\nNobody stops', 'A sign says "Stop." Nobody stops.'),
        ("A dog! A cat? a dog! A cat? A bird.", "A dog! A cat? A bird."),
        ("Is it a dog? It is. And it", "Is it a dog? It is."),
        ("It is red!", "It is red!"),
        ('She said "猫。" A dog.', 'She said "猫。" A dog.'),
        ("(猫。) A dog. (猫。)", "(猫。) A dog."),
        ("猫がいる。犬がいる。猫がいる。鳥が", "猫がいる。 犬がいる。"),
    ],
)
def test_reference_cuts_and_drops(raw: str, clean: str) -> None:
    assert reference(raw) == clean
    assert reference(clean) == clean


def test_postprocess_changes_the_fingerprint() -> None:
    plain, cleaned = GenerateConfig(), GenerateConfig(postprocess="reference")
    assert plain.postprocessed("A dog. A d") == "A dog. A d"
    assert plain.identity() != cleaned.identity()
    assert plain.identity() == GenerateConfig(batch_size=3).identity()


def test_a_cleaned_caption_still_counts_as_truncated(settings) -> None:
    config = settings("generate.postprocess=reference", "generate.max_new_tokens=1", "data.limit=5")
    assert recaption(config) == {"ok": 5}
    rows = list(read_rows(parquet_files(config.data.output), ["truncated", "num_tokens"]))
    assert rows == [{"truncated": True, "num_tokens": 1}] * 5
