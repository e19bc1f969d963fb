"""Runs the captioner's language model in vLLM (`generate.engine=vllm`), on CUDA.

Encoder, text encoder and projector compute prefixes in this process. vLLM takes each prefix as prompt
embeddings (`prompt_embeds`, docs.vllm.ai/en/stable/features/prompt_embeds) and decodes with paged
attention and its own batching. Written for the documented interface of vLLM 0.30 and tested with a
fake; not yet run on a GPU.
"""

from __future__ import annotations

import tempfile
from collections import deque
from typing import Any

import torch
from torch import Tensor

from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.engine import Engine, Outcome, Request
from vlv_model.caption_tokens import FinishReason, GeneratedCaption, caption_text, end_of_text_id
from vlv_model.captioner import VLVCaptioner
from vlv_model.errors import ConfigError
from vlv_model.seeds import mix_bytes

_GPU_SHARE = 0.8  # of GPU memory for vLLM; the encoder uses the rest


class VLLMEngine(Engine):
    """Prefixes from the captioner in this process, captions from vLLM."""

    def __init__(
        self, captioner: VLVCaptioner, generate: GenerateConfig, device: torch.device
    ) -> None:
        """Move the language model of `captioner`, which is on the CPU, to vLLM.

        Raises ConfigError when vLLM is not installed.
        """
        try:
            import vllm
        except ImportError:
            raise ConfigError(
                "generate.engine=vllm, but vLLM is not installed: pip install 'vlv-ray[vllm]', or leave "
                "generate.engine out"
            ) from None
        self._sampling_params: Any = vllm.SamplingParams
        self.end_of_text = end_of_text_id(captioner.tokenizer)
        with tempfile.TemporaryDirectory(prefix="vlv-vllm-") as folder:
            captioner.language_model.save_pretrained(folder)
            captioner.tokenizer.save_pretrained(folder)
            self.llm: Any = vllm.LLM(
                model=folder,
                dtype=generate.precision,
                enable_prompt_embeds=True,
                max_model_len=captioner.encoder.num_queries + generate.max_new_tokens,
                max_num_seqs=generate.batch_size,
                gpu_memory_utilization=_GPU_SHARE,
                seed=0,
            )
        captioner.language_model.to("meta")  # frees its memory but keeps its dtype
        for name, part in captioner.named_children():
            if name != "language_model":
                part.to(device)
        super().__init__(captioner, generate)

    def _advance(self, waiting: deque[Request]) -> list[Outcome]:
        """Caption all that wait; vLLM does its own batching."""
        size = self.generate.batch_size
        running: dict[int, Request] = {}
        prompts: list[dict[str, Tensor]] = []
        while batch := self._start(waiting, size):
            running |= batch
            prompts += [
                {"prompt_embeds": prefix} for prefix in self._prefixes(batch).cpu()
            ]  # [q h]
        params = [self._params(request.key) for request in running.values()]
        results = self.llm.generate(prompts, sampling_params=params, use_tqdm=False)
        return [
            self._finish(number, self._caption(result.outputs[0]))
            for number, result in zip(running, results, strict=True)
        ]

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
            stop_token_ids=[self.end_of_text],
            detokenize=False,
            **params,
        )

    def _caption(self, output: Any) -> GeneratedCaption:
        ids = list(output.token_ids)
        if ids and ids[-1] == self.end_of_text:  # vLLM returns the stop token too
            ids.pop()
        reason: FinishReason = "length" if output.finish_reason == "length" else "stop"
        return GeneratedCaption(caption_text(self.captioner.tokenizer, ids), len(ids), reason)
