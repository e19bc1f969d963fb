"""Estimate the GPU memory of training and recaption at the published sizes, without a GPU.

    python -m benchmarks.training.memory

The models are on the meta device, so nothing is computed. Weights, gradients and optimiser states
follow from what is trained. Activations are counted: forward and backward run with fused attention, and
each storage counts from its allocation until it is freed. Captions have the maximum length, so most
batches need less. Prints a table of GB (10^9 bytes) per GPU and, as the last line, JSON.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface

from benchmarks.training import models, published_configs
from pipelines.training.config import Stage2TrainConfig
from pipelines.training.deepspeed_config import BUCKET
from pipelines.training.flops import forget_gradient
from pipelines.training.stages import Stage, captioning, denoising
from vlv_model.config import Lora, Precision
from vlv_model.precision import cast, dtype_of

META = torch.device("meta")
_aten = torch.ops.aten
# GB of CUDA's context, kernels, workspaces of cuBLAS and cuDNN, and NCCL's buffers. From figures that
# users of DeepSpeed report; not measured.
OVERHEAD = 1.5
FRAGMENTATION = 1.10  # the allocator's memory / the activations' memory


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live storages that operations allocated: `now`, and the peak `most`."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        """`known` are tensors that are not counted."""
        super().__init__()
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()
        for tensor in known:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Memory:
    """Gigabytes (10^9 bytes) of one worker."""

    weights: float
    gradients: float  # its shard of the gradients, and buckets
    optimizer: float  # its shard of master weights and moments
    activations: float  # peak of forward and backward, with inputs
    total: float


@dataclass(frozen=True)
class Setup:
    """Settings of a training run."""

    stage: str
    precision: Precision = "bfloat16"
    micro_batch: int = 16
    activation_checkpointing: bool = False
    stored_latents: bool = True
    language_model: str = "3B"
    lora: int = 0
    workers: int = 8  # ZeRO-2
    offload: bool = False


def memory(setup: Setup) -> Memory:
    """Memory of each worker's GPU."""
    stage, step = (_stage1 if setup.stage == "stage1" else _stage2)(setup)
    model = cast(stage.model, setup.precision)
    if setup.activation_checkpointing:
        stage.checkpoint_activations()
    model.train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = dtype_of(setup.precision).itemsize
    weights = size * sum(p.numel() for p in model.parameters()) / 1e9
    shards = setup.workers
    states = 0.0 if setup.offload else 12 * trained / shards / 1e9
    # ZeRO-2 keeps gradients on the GPU even with offload, and two buckets, each also in float32. A
    # tensor larger than a bucket (Qwen's token embeddings) is reduced separately.
    largest = max(p.numel() for p in model.parameters() if p.requires_grad)
    gradients = 4 * trained / shards / 1e9
    gradients += (2 * BUCKET * (size + 4) + 4 * largest * (largest > BUCKET)) / 1e9
    activations = live_bytes(model, step) / 1e9
    fixed = weights + gradients + states
    total = fixed + activations * FRAGMENTATION + OVERHEAD
    return Memory(*(round(value, 1) for value in (weights, gradients, states, activations, total)))


def captioning_memory(precision: Precision, rows: int, beams: int = 1) -> Memory:
    """Memory of a recaption actor with the 3B model: the larger of prefix and key-value cache."""
    model = cast(models.captioner(models.SIZES["full"], META), precision).eval()
    size = dtype_of(precision).itemsize
    weights = size * sum(p.numel() for p in model.parameters())
    known = iter([*model.parameters(), *model.buffers()])
    with torch.no_grad(), _fused_attention(model), LiveTensors(known) as live:
        model.prefix(_squares(rows))
    shape = model.language_model.config
    width = shape.num_key_value_heads * shape.hidden_size // shape.num_attention_heads
    positions = model.encoder.num_queries + Stage2TrainConfig().max_caption_tokens
    cache = rows * beams * positions * shape.num_hidden_layers * 2 * width * size
    # Beam search reorders keys and values: the old and the new ones exist at the same time.
    cache = cache * (2 if beams > 1 else 1) + 2 * rows * beams * shape.vocab_size * 4
    activations = max(live.most, cache) / 1e9
    total = weights / 1e9 + activations * FRAGMENTATION + OVERHEAD
    return Memory(*(round(value, 1) for value in (weights / 1e9, 0.0, 0.0, activations, total)))


def live_bytes(model: nn.Module, step: Callable[[], Tensor]) -> int:
    """Peak of live bytes without weights; a gradient is freed as soon as it is complete."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(forget_gradient)
    known = iter([*model.parameters(), *model.buffers()])
    on_meta = next(model.parameters()).is_meta
    fused = _fused_attention(model) if on_meta else nullcontext()
    with fused, LiveTensors(known) as live:
        step().backward()
    return live.most


def _stage1(setup: Setup) -> tuple[Stage, Callable[[], Tensor]]:
    model = models.autoencoder(models.SIZES["full"], META)
    rows = setup.micro_batch
    if setup.stored_latents:
        model.diffusion_decoder.vae = None  # type: ignore[assignment]

    def step() -> Tensor:
        latents = torch.zeros(rows, *model.latent_shape, device=META)
        inputs = {
            "pixel_values": _squares(rows),
            "noise": torch.zeros_like(latents),
            "timesteps": torch.zeros(rows, dtype=torch.long, device=META),
        }
        inputs["latents" if setup.stored_latents else "posterior_noise"] = latents
        loss: Tensor = model(**inputs)
        return loss

    return denoising(model, seed=0), step


def _stage2(setup: Setup) -> tuple[Stage, Callable[[], Tensor]]:
    size = replace(
        models.SIZES["full"], language_model=published_configs.QWEN_25[setup.language_model]
    )
    model = models.captioner(size, META)
    if setup.lora:
        model.add_adapters(Lora(rank=setup.lora), seed=0)
    train = Stage2TrainConfig()
    model.set_trainable(train.trainable)
    rows, tokens = setup.micro_batch, train.max_caption_tokens

    def step() -> Tensor:
        # Not the model's forward, which selects labels by value, impossible on the meta device.
        ids = torch.zeros(rows, tokens, dtype=torch.long, device=META)
        prefix = model.prefix(_squares(rows))
        embeddings = model.language_model.get_input_embeddings()(ids)
        hidden = model.language_model.model(
            inputs_embeds=torch.cat([prefix, embeddings], dim=1), use_cache=False
        ).last_hidden_state
        logits = model.language_model.lm_head(hidden[:, prefix.shape[1] - 1 : -1].flatten(0, 1))
        return F.cross_entropy(logits.float(), ids.flatten(), reduction="sum")

    return captioning(model, "caption", tokens), step


def _squares(rows: int) -> Tensor:
    side = models.SIZES["full"].image_size
    return torch.zeros(rows, 3, side, side, dtype=torch.uint8, device=META)


@contextmanager
def _fused_attention(model: nn.Module) -> Iterator[None]:
    """Use attention that stores no scores, as on CUDA; on the meta device torch would store them."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any) -> Tensor:
        causal = bool(given.get("is_causal"))
        if query.dtype == torch.float32:  # the flash kernel does not support float32
            attended = _aten._scaled_dot_product_efficient_attention(
                query, key, value, None, True, 0.0, causal
            )
        else:
            attended = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)
        out: Tensor = attended[0]
        return out

    def interface(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        causal = bool(getattr(module, "is_causal", False)) and query.shape[2] > 1
        return attend(query, key, value, is_causal=causal).transpose(1, 2), None

    AttentionInterface.register("counted", interface)
    for part in model.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = "counted"
    original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


RECIPES = {
    **{
        f"stage 1, {rows}{' checkpointed' * checkpointed}": Setup(
            "stage1", micro_batch=rows, activation_checkpointing=checkpointed
        )
        for rows in (8, 16, 32)
        for checkpointed in (False, True)
    },
    **{
        f"stage 1, {rows}, VAE in every step": Setup(
            "stage1", micro_batch=rows, stored_latents=False
        )
        for rows in (8, 16, 32)
    },
    **{
        f"stage 1, float32, {rows}{' checkpointed' * checkpointed}": Setup(
            "stage1", "float32", rows, checkpointed, stored_latents=False
        )
        for rows in (4, 8, 16)
        for checkpointed in (False, True)
    },
    **{
        f"stage 2, {size}, {rows}{' checkpointed' * checkpointed}": Setup(
            "stage2", micro_batch=rows, activation_checkpointing=checkpointed, language_model=size
        )
        for size in ("3B", "1.5B", "0.5B")
        for rows in (2, 4, 8)
        for checkpointed in (False, True)
    },
    **{
        f"stage 2, {size}, LoRA 16, one GPU, {rows} checkpointed": Setup(
            "stage2", "bfloat16", rows, True, language_model=size, lora=16, workers=1
        )
        for size, rows in (("3B", 2), ("3B", 8), ("0.5B", 8))
    },
    "stage 2, 3B, one GPU, offload, 2 checkpointed": Setup(
        "stage2", "bfloat16", 2, True, workers=1, offload=True
    ),
    "stage 2, 3B, one GPU, 2 checkpointed": Setup("stage2", "bfloat16", 2, True, workers=1),
    "stage 1, one GPU, 8": Setup("stage1", micro_batch=8, workers=1),
    "stage 1, one GPU, 8 checkpointed": Setup("stage1", "bfloat16", 8, True, workers=1),
}


CAPTIONS: dict[str, tuple[Precision, int, int]] = {
    "recaption, 3B, 32": ("bfloat16", 32, 1),
    "recaption, 3B, 64": ("bfloat16", 64, 1),
    "recaption, 3B, float32, 4 beams, 8": ("float32", 8, 4),
    "recaption, 3B, float32, 4 beams, 32": ("float32", 32, 4),
    "recaption, 3B, float32, 4 beams, 64": ("float32", 64, 4),
}


def main() -> None:
    print("| training | weights | gradients | optimiser | activations | total GB |")
    print("|---|---|---|---|---|---|")
    results = {}
    counts: dict[str, Callable[[], Memory]] = {
        name: partial(memory, setup) for name, setup in RECIPES.items()
    } | {name: partial(captioning_memory, *setup) for name, setup in CAPTIONS.items()}
    for name, count in counts.items():
        results[name] = asdict(count())
        print(f"| {name} | {' | '.join(map(str, results[name].values()))} |", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
