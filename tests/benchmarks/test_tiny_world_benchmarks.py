"""The tiny models' two benchmarks, without the training: variants, tables and targets."""

import json
from pathlib import Path

import pytest

from benchmarks.quality import ablation, proof

SUMMARY = {
    "captions": {
        "exact_match": 0.97,
        "exact_match_held_out_combinations": 0.85,
        "attributes": {"size": 1.0, "colour": 0.99},
        "attributes_held_out_combinations": {"size": 1.0, "colour": 0.93},
    },
    "control": {"exact_match": 0.2, "exact_match_held_out_combinations": 0.0},
    "reconstruction": {"attributes": 0.96, "ceiling": 0.98, "floor": 0.4},
    "denoising": {"gap_closed": 0.9},
    "seconds": {"ingest": 1.0, "stage1": 2.5},
}


def test_variants_that_differ_only_in_stage_2_share_an_encoder() -> None:
    encoders = [variant.encoder for variant in ablation.VARIANTS]
    assert len(set(encoders[:3])) == 1
    assert len(set(encoders)) == 4
    assert len({variant.name for variant in ablation.VARIANTS}) == len(ablation.VARIANTS)


def test_the_table_has_mean_and_deviation_in_percent() -> None:
    runs = [dict.fromkeys(ablation.FIGURES, value) for value in (0.5, 0.6, 0.7)]
    lines = ablation.table({"projector only": runs}).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2].startswith("| projector only | 60.0 ± 10.0 |")


def test_the_proof_compares_its_figures_with_the_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The demos themselves are what tests/jobs/test_demo.py runs.
    monkeypatch.setattr(proof, "run_demo", lambda config, configs: SUMMARY)
    assert proof.main([str(tmp_path), "--full", "--seeds", "0", "4"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["missed"] == []
    assert figures["worst_attribute_held_out_combinations"] == 0.93
    assert figures["seconds"] == 3.5
    worse = {**SUMMARY, "reconstruction": {"attributes": 0.9, "ceiling": 0.98, "floor": 0.4}}
    monkeypatch.setattr(proof, "run_demo", lambda config, configs: worse)
    assert proof.main([str(tmp_path), "--full"]) == 1
    missed = json.loads(capsys.readouterr().out.splitlines()[-1])["missed"]
    assert missed == ["reconstruction_less_ceiling"]
