"""The recaption benchmark: its contenders give equal captions, and its figures are right."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from benchmarks.recaption import captioners
from benchmarks.recaption.loops import WAYS, Loop, run_loop
from benchmarks.recaption.throughput import LOOPS, Bench, job_rates, margin, summarise
from pipelines.recaption import job
from pipelines.recaption.engine import local_engine
from pipelines.storage.tables import Table
from vlv_model.caption_tokens import caption_text


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("bench"), "tiny", "cpu", quick=True)
    bench.prepare()
    return bench


def test_all_contenders_end_at_the_forced_length(bench: Bench) -> None:
    cpu = torch.device("cpu")
    plain = run_loop(Loop(4, 1, stop=True), bench.model, bench.file, 8, bench.longest, cpu)
    beams = run_loop(Loop(2, 4, stop=True), bench.model, bench.file, 2, bench.longest, cpu)
    lengths = {key: captioners.forced_length(key, bench.longest) - 1 for key in plain.ids}
    assert len(set(lengths.values())) > 2
    assert {key: len(ids) for key, ids in plain.ids.items()} == lengths
    assert {key: len(ids) for key, ids in beams.ids.items()} == dict(list(lengths.items())[:2])
    endless = run_loop(Loop(2, 1, stop=False), bench.model, bench.file, 2, bench.longest, cpu)
    assert [len(ids) for ids in endless.ids.values()] == [bench.longest] * 2

    captioner = captioners.open_captioner(bench.model)
    squares = captioners.squares_of(bench.file, plain.ids, captioner)
    engine = local_engine(captioner, bench.config().generate)
    images = torch.stack(list(squares.values()))
    for outcome in engine.captions(list(squares), images):
        key = list(squares)[outcome.id]
        ids = plain.ids[key]
        assert outcome.caption is not None
        assert outcome.caption.text == caption_text(captioner.tokenizer, ids)


def test_the_margin_is_at_the_first_different_token(bench: Bench) -> None:
    captioner = captioners.open_captioner(bench.model)
    square = next(iter(captioners.squares_of(bench.file, {0}, captioner).values()))
    with torch.no_grad():
        prefix = captioner.prefix(square[None])
        logits = captioner.language_model(inputs_embeds=prefix).logits[0, -1]
    logits[captioner.tokenizer.eos_token_id] = -torch.inf
    first, second = logits.topk(2)[0].tolist()
    assert margin(captioner, square, [5, 6], "") == pytest.approx(first - second, abs=1e-5)


def test_the_rate_of_a_job_leaves_out_its_start(tmp_path: Path) -> None:
    table = Table(tmp_path / "table")
    table.folder.mkdir()
    table.create("caption", {}, chunks=4)
    for chunk in range(4):
        rows = {"key": [chunk], "status": ["ok"], "num_tokens": [10]}
        table.write(chunk, pa.table(rows))
        os.utime(tmp_path / f"table/_commits/{chunk:06d}.json", (0, 100 + 2 * chunk))
    rates = job_rates(table.folder, begun=90, seconds=40, workers=2)
    assert rates == {
        "captions_per_second": 0.5,  # two rows between the times 102 and 106
        "tokens_per_second": 5.0,
        "captions_per_second_over_all": 0.1,
        "seconds_to_first_commit": 10,
        "seconds": 40,
    }


def test_streamed_slots_are_fuller_than_drained_ones(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    slots = Bench(bench.folder, "tiny", "cpu", quick=True, slots=True)
    slots.prepare()
    found = {way: slots.contend(way) for way in WAYS}  # which checks the lengths
    assert found["drained"]["slots_used"] + 0.1 < found["streamed"]["slots_used"] <= 1
    assert found["streamed"]["decoder_steps"] < found["drained"]["decoder_steps"]
    assert all(figures["captions_per_cpu_second"] > 0 for figures in found.values())


def test_ratios_are_of_medians() -> None:
    runs = {name: [{"captions_per_second": n} for n in (1, 2, 9)] for name in (*LOOPS, "bare")}
    found = summarise({**runs, "ours": [{"captions_per_second": n} for n in (4, 6, 5)]})
    assert (found["ratio_to_plain"], found["share_of_bare_model"]) == (2.5, 2.5)


@pytest.mark.end_to_end
def test_the_job_gives_the_plain_loops_captions(
    bench: Bench, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "open_step", captioners.ForcedCaptionImages)
    bench.contend("ours")
    assert bench.contend("plain")["images"] == 8
    assert json.loads((bench.folder / "plain.json").read_text())
    compared = bench.compared()
    assert (compared["captions_compared"], compared["captions_identical"]) == (8, True)
