"""The captioner with its language model in vLLM (`generate.engine=vllm`), for CUDA.

Encoder, text encoder and projector stay in this process and make the prefixes; vLLM takes each as
the embeddings of a prompt (`prompt_embeds`, docs.vllm.ai/en/stable/features/prompt_embeds) and
decodes with paged attention and batches of its own. Written against vLLM 0.30's documented
interface and held against it by a stand-in in the tests; it has not run on a GPU yet.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.recaption.config import GenerateConfig
from pipelines.recaption.engine import Engine, Outcome
from vlv_model.caption_tokens import FinishReason, GeneratedCaption, caption_text, end_of_text_id
from vlv_model.captioner import VLVCaptioner
from vlv_model.errors import ConfigError
from vlv_model.freezing import evaluating

_GPU_SHARE = 0.8  # of the GPU's memory for vLLM; the encoder works in the rest


class VLLMEngine(Engine):
    """Prefixes from the captioner in this process, captions from vLLM."""

    def __init__(
        self, captioner: VLVCaptioner, generate: GenerateConfig, device: torch.device
    ) -> None:
        """`captioner` is on the CPU, in the arithmetic of the settings; its language model is handed
        over. Raises ConfigError where vLLM is not installed.
        """
        try:
            import vllm
        except ImportError:
            raise ConfigError(
                "generate.engine=vllm, and vLLM is not installed: pip install 'vlv-ray[vllm]', or "
                "leave generate.engine out"
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
        captioner.language_model.to(
            "meta"
        )  # its memory is vLLM's now; its dtype is still asked for
        for name, part in captioner.named_children():
            if name != "language_model":
                part.to(device)
        super().__init__(captioner, generate)

    def _together(self, keys: Sequence[int], images: Tensor) -> Iterator[Outcome]:
        size = self.generate.batch_size
        prompts: list[dict[str, Tensor]] = []
        with evaluating(self.captioner), torch.no_grad():
            for start in range(0, len(images), size):
                prefixes = self.captioner.prefix(images[start : start + size].to(self.device))
                prompts += [{"prompt_embeds": prefix} for prefix in prefixes.cpu()]  # [q h] each
        settings = [self._settings(key) for key in keys]
        answers = self.llm.generate(prompts, sampling_params=settings, use_tqdm=False)
        for position, answer in enumerate(answers):
            yield Outcome(position, self._caption(answer.outputs[0]))

    def _settings(self, key: int) -> Any:
        draws = self.generate.draws
        how: dict[str, Any] = {"temperature": 0.0}  # greedy
        if draws is not None:
            name = struct.pack("<qq", draws["seed"], key)
            digest = hashlib.blake2b(name, digest_size=8).digest()
            seed = int.from_bytes(digest, "little") >> 1  # another one for each image
            how = {"temperature": draws["temperature"], "top_p": draws["top_p"], "seed": seed}
        return self._sampling_params(
            max_tokens=self.generate.max_new_tokens,
            stop_token_ids=[self.end_of_text],
            detokenize=False,
            **how,
        )

    def _caption(self, said: Any) -> GeneratedCaption:
        ids = list(said.token_ids)
        if ids and ids[-1] == self.end_of_text:  # the token that stopped it is handed back, too
            ids.pop()
        reason: FinishReason = "length" if said.finish_reason == "length" else "stop"
        return GeneratedCaption(caption_text(self.captioner.tokenizer, ids), len(ids), reason)
