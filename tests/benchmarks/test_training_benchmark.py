"""The training benchmark at its smallest: every line runs, and both sides compute the same."""

import json

import pytest
import torch

from benchmarks.training import throughput as training
from benchmarks.training.models import SIZES
from benchmarks.training.steps import (
    Masters,
    Variant,
    batch_of,
    our_stage,
    reference_inputs,
    reference_loss,
    step_of,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.faults
def test_the_last_line_has_ratios_and_parity(capsys):
    assert (
        training.main(["--size", "tiny", "--device", "cpu", "--quick", "--stages", "stage1"]) == 0
    )
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["benchmark"], figures["size"], figures["device"]) == ("training", "tiny", "cpu")
    assert figures["stage1_ratio"] > 0
    assert figures["mfu"] is None  # no matrix rate is measured on a CPU
    assert figures["stage1_loss_difference"] <= 1e-4


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_gradients_are_the_references(stage):
    ours = our_stage(SIZES["tiny"], stage, CPU, kept=False)
    theirs = our_stage(SIZES["tiny"], stage, CPU, kept=False)
    batch = batch_of(SIZES["tiny"], stage)
    ours.model.eval()(**ours.prepare(batch).inputs).backward()
    reference_loss(theirs).eval()(*reference_inputs(SIZES["tiny"], theirs, batch)).backward()
    expected = {n: p.grad for n, p in theirs.model.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_steps_of_a_variant_train(capsys):
    step = step_of(SIZES["tiny"], "stage2", CPU, Variant("ours", precision="bfloat16"))
    losses = [step() for _ in range(20)]
    assert max(losses[-5:]) < min(losses[:5])  # three steps move it less than dropout does


def test_master_weights_keep_updates_that_bfloat16_loses():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    masters = Masters(optimizer)
    for _ in range(100):  # each of them rounds away in bfloat16
        weight.grad = torch.ones_like(weight)
        masters.take_gradients()
        optimizer.step()
        masters.give_weights()
    assert weight.tolist() == [pytest.approx(0.99, abs=4e-3)] * 4
