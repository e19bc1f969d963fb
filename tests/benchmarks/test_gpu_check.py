"""The check of a GPU, run on a CPU with tiny models, and its parts' limits."""

import json
import math

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.children import run_part
from benchmarks.gpu.device import published_peak
from benchmarks.gpu.parts import PARTS, Part


@pytest.mark.faults
def test_on_a_cpu_every_part_runs_or_says_what_it_needs(capsys):
    assert main(["--device", "cpu", "--size", "tiny"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = figures["parts"]
    assert list(parts) == list(PARTS)
    assert parts["make gpu"] == {"status": "skipped", "reason": "needs a CUDA device"}
    assert parts["vLLM"]["status"] == "skipped"
    assert all(
        part["status"] == "ok" for name, part in parts.items() if name not in ("make gpu", "vLLM")
    )
    for stage in (1, 2):
        step = parts[f"stage {stage} step"]
        assert step["parity"]
        assert step["loss_difference"] <= 1e-4
        assert {"reference", "ours"} <= step["variants"].keys()
        compared = parts[f"stage {stage} bfloat16"]
        assert compared["loss_difference"] < 0.02
        assert 0.95 < compared["gradient_cosine"] < 1
    for name in ("captions, greedy", "captions, beam 4"):
        assert parts[name]["float32"]["equal_captions"] == 1
    assert (parts["NCCL"]["backend"], parts["NCCL"]["correct"]) == ("gloo", True)
    deepspeed = parts["DeepSpeed"]
    assert deepspeed["losses"] == pytest.approx(deepspeed["plain_losses"], rel=1e-4)
    assert deepspeed["losses"][1] != deepspeed["losses"][0]
    assert parts["device"]["matrix_tflops"] > 0


def test_a_part_says_what_is_missing():
    part = Part("x", "device:device", ("torch", "no_such_package"), 1)
    assert part.lacking("cuda") == "pip install no_such_package"
    assert (
        Part("x", "device:device", ("torch",), 1, cuda=True).lacking("cpu") == "needs a CUDA device"
    )
    assert Part("x", "device:device", ("torch",), 1, cuda=True).lacking("cuda") is None


def test_a_part_that_hangs_or_fails_is_one_result():
    assert run_part("device", "tiny", "cpu", limit=0.01)["status"] == "timeout"
    failed = run_part("device", "enormous", "cpu", limit=60)
    assert (failed["status"], failed["reason"]) == ("failed", "ended with status 2")
    assert "invalid choice: 'enormous'" in failed["output"]


def test_every_part_has_a_function_and_the_limits_are_those_of_a_short_call():
    assert all(callable(part.load()) for part in PARTS.values())
    assert math.fsum(part.seconds for part in PARTS.values()) < 900


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", None),
    ],
)
def test_the_published_peak_is_found_by_torchs_name(name, tflops):
    peak = published_peak(name)
    assert peak == (tflops and tflops * 1e12)
