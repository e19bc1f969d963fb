"""The vLLM engine with a fake that checks vLLM's documented interface."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from pipelines.cli.config import build
from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.vllm_engine import VLLMEngine
from tests.vlv_model.drawings import scenes
from vlv_model.captioner import VLVCaptioner
from vlv_model.decoding import decode
from vlv_model.errors import ConfigError
from vlv_model.freezing import evaluating

CPU = torch.device("cpu")


@dataclass
class SamplingParams:
    """vllm.SamplingParams: the fields in use, with their documented defaults and bounds."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        assert self.temperature >= 0
        assert 0 < self.top_p <= 1
        assert self.seed is None or -(2**63) <= self.seed < 2**63


class LLM:
    """vllm.LLM: keyword-only after the model, prompts as vllm.inputs.EmbedsPrompt."""

    def __init__(
        self, model: str, *, dtype: str, enable_prompt_embeds: bool, max_model_len: int,
        max_num_seqs: int, gpu_memory_utilization: float, seed: int,
    ) -> None:  # fmt: skip
        assert enable_prompt_embeds
        assert 0 < gpu_memory_utilization < 1
        self.model = Qwen2ForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.eos = AutoTokenizer.from_pretrained(model).eos_token_id
        self.max_model_len, self.max_num_seqs = max_model_len, max_num_seqs
        self.asked: list[Any] = []

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert len(prompts) == len(sampling_params)
        self.asked += sampling_params
        return [self._answer(*each) for each in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt: dict, params: SamplingParams) -> SimpleNamespace:
        assert set(prompt) == {"prompt_embeds"}
        embeds = prompt["prompt_embeds"]
        assert embeds.ndim == 2
        assert embeds.shape[1] == self.model.config.hidden_size
        assert embeds.dtype == self.model.dtype
        assert not embeds.requires_grad
        assert len(embeds) + params.max_tokens <= self.max_model_len
        drawn = {"do_sample": False}
        if params.temperature:
            torch.manual_seed(params.seed)
            drawn = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p}
        stops = {self.eos, *params.stop_token_ids}
        with torch.no_grad():
            ids = self.model.generate(
                inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds)).long(),
                max_new_tokens=params.max_tokens, eos_token_id=list(stops), pad_token_id=self.eos,
                **drawn,
            )[0].tolist()  # fmt: skip
        reason = "stop" if ids[-1] in stops else "length"
        output = SimpleNamespace(index=0, text="", token_ids=tuple(ids), finish_reason=reason)
        return SimpleNamespace(outputs=[output], finished=True)


@pytest.fixture
def vllm(monkeypatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)


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


def test_captions_match_the_transformers_engine(vllm, captioner):
    images = scenes(7, seed=0)
    expected = captioner.generate(images, max_new_tokens=12)
    assert {caption.finish_reason for caption in expected} == {"stop", "length"}
    engine = VLLMEngine(captioner, greedy(batch_size=3), CPU)
    assert engine.llm.max_num_seqs == 3
    found = {o.id: o.caption for o in engine.captions(range(7), images)}
    assert [found[i] for i in range(7)] == expected
    assert {params.temperature for params in engine.llm.asked} == {0.0}
    assert {p.device.type for p in captioner.language_model.parameters()} == {"meta"}


def test_each_sampled_caption_has_its_own_seed(vllm, captioner):
    images, settings = scenes(3, seed=0), greedy(temperature=1.5, top_p=0.9, seed=7)
    engine = VLLMEngine(captioner, settings, CPU)
    first = {o.id: o.caption for o in engine.captions([5, -6, 7], images)}
    turned = {o.id: o.caption for o in engine.captions([7, -6, 5], images.flip(0))}
    assert [first[i] for i in range(3)] == [turned[2 - i] for i in range(3)]
    assert len({params.seed for params in engine.llm.asked}) == 3


def test_a_failing_image_does_not_affect_other_captions(vllm, captioner, monkeypatch):
    images = scenes(4, seed=0)
    engine = VLLMEngine(captioner, greedy(), CPU)
    prefix = captioner.prefix

    def failing(pixels):
        if any(torch.equal(square, images[2]) for square in pixels):
            raise RuntimeError("a bad day")
        return prefix(pixels)

    monkeypatch.setattr(captioner, "prefix", failing)
    found = {o.id: o for o in engine.captions(range(4), images)}
    assert [found[i].caption is None for i in range(4)] == [False, False, True, False]
    assert found[2].error == "RuntimeError: a bad day"


def test_unsupported_settings_are_refused(captioner, monkeypatch):
    with pytest.raises(ConfigError, match="num_beams=1"):
        greedy(num_beams=4)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlv-ray\[vllm\]'"):
        VLLMEngine(captioner, greedy(), CPU)
    assert greedy().identity() != GenerateConfig(num_beams=1, max_new_tokens=12).identity()
