"""A stand-in for the parts of vLLM 0.30 that pipelines/recaption/vllm_engine.py uses.

`test_vllm.py` compares its signatures with the real ones, where vLLM is installed.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

RequestOutputKind = Enum("RequestOutputKind", [("CUMULATIVE", 0), ("DELTA", 1), ("FINAL_ONLY", 2)])


@dataclass
class SamplingParams:
    """vllm.SamplingParams: the fields in use, with their defaults and bounds."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    detokenize: bool = True
    output_kind: Any = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        assert self.temperature == 0 or 0.01 <= self.temperature <= 2
        assert 0 < self.top_p <= 1
        assert self.seed is None or -(2**63) <= self.seed < 2**63


class LLM:
    """vllm.LLM: a folder's model, and the engine that requests go to."""

    def __init__(
        self, model: str, *, skip_tokenizer_init: bool = False, dtype: str = "auto",
        seed: int = 0, gpu_memory_utilization: float = 0.92, kv_cache_memory_bytes: int | None = None,
        enforce_eager: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        assert skip_tokenizer_init
        self.arguments = {
            "enforce_eager": enforce_eager, "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "gpu_memory_utilization": gpu_memory_utilization, **kwargs,
        }  # fmt: skip
        qwen = Qwen2ForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.llm_engine = LLMEngine(qwen, **kwargs)


class LLMEngine:
    """vllm.LLMEngine: a step adds a token to each of at most `max_num_seqs` requests."""

    def __init__(
        self, model: Qwen2ForCausalLM, *, enable_prompt_embeds: bool, enable_prefix_caching: bool,
        max_model_len: int, max_num_seqs: int,
    ) -> None:  # fmt: skip
        assert enable_prompt_embeds
        assert max_model_len <= model.config.max_position_embeddings
        self.model, self.max_model_len, self.max_num_seqs = model, max_model_len, max_num_seqs
        self.requests: dict[str, Iterator[int]] = {}  # in the order of their arrival
        self.asked: list[SamplingParams] = []
        self.most_waiting = 0
        self.reasons: deque[str] = deque()  # of the next requests to end, in place of their own
        self.engine_core = SimpleNamespace(shutdown=self.requests.clear)

    def add_request(self, request_id: str, prompt: dict, params: SamplingParams) -> str:
        embeds = prompt["prompt_embeds"]
        assert prompt["type"] == "embeds"
        assert embeds.ndim == 2
        assert embeds.shape[1] == self.model.config.hidden_size
        assert embeds.dtype == self.model.dtype
        assert embeds.device.type == "cpu"
        assert not embeds.requires_grad
        assert len(embeds) + params.max_tokens <= self.max_model_len
        assert params.output_kind == RequestOutputKind.FINAL_ONLY
        assert request_id not in self.requests
        self.requests[request_id] = self._decode(embeds, params)
        self.asked.append(params)
        self.most_waiting = max(self.most_waiting, len(self.requests) - self.max_num_seqs)
        return f"{request_id}-1234abcd"

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[SimpleNamespace]:
        results = []
        for request_id in list(self.requests)[: self.max_num_seqs]:
            try:
                next(self.requests[request_id])
            except StopIteration as end:
                del self.requests[request_id]
                ids, reason = end.value
                reason = self.reasons.popleft() if self.reasons else reason
                output = SimpleNamespace(text="", token_ids=ids, finish_reason=reason)
                results.append(SimpleNamespace(request_id=request_id, outputs=[output]))
        return results

    @torch.no_grad()
    def _decode(self, embeds: torch.Tensor, params: SamplingParams) -> Any:
        """Yields at each token; returns (token ids with the stop token, finish reason)."""
        generator = torch.Generator().manual_seed(params.seed or 0)
        table, ids = self.model.get_input_embeddings().weight, []
        eos = [] if params.ignore_eos else [self.model.config.eos_token_id]
        while len(ids) < params.max_tokens:
            logits = self.model(inputs_embeds=torch.cat([embeds, table[ids]])[None]).logits[0, -1]
            if params.temperature:
                probabilities = (logits / params.temperature).softmax(-1)
                ids.append(int(probabilities.multinomial(1, generator=generator)))
            else:
                ids.append(int(logits.argmax()))
            if ids[-1] in (*eos, *params.stop_token_ids):
                return ids, "stop"
            yield ids[-1]
        return ids, "length"


def modules(device: str = "cpu") -> dict[str, ModuleType]:
    """vLLM's modules by name, built for `device`."""
    vllm, params, platforms = map(ModuleType, ("vllm", "vllm.sampling_params", "vllm.platforms"))
    vllm.LLM, vllm.SamplingParams, vllm.sampling_params = LLM, SamplingParams, params
    params.RequestOutputKind = RequestOutputKind
    platforms.current_platform = SimpleNamespace(device_type=device)
    return {module.__name__: module for module in (vllm, params, platforms)}
