"""Counts the memory and FLOPs of a model's step without computing it.

A dispatch mode follows each storage from its allocation until it is freed, and adds up the FLOPs of
matrix products, convolutions and attention. The tensors hold no data: they are on the meta device,
or fake tensors of a CPU.

The two differ in attention. On CUDA it runs in fused kernels that keep no scores. A CPU has such a
kernel too, but not for dropout: there torch keeps the scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface

from pipelines.estimate.flops import FORMULAS, forget_gradient

Device = Literal["cuda", "cpu"]
_aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    **{kernel: shape_wrapper(formula) for kernel, formula in FORMULAS.items()},
}


@contextmanager
def without_data(device: Device, model: nn.Module) -> Iterator[torch.device]:
    """A block whose tensors, made on the yielded device, have shapes but no data.

    `model` is on the meta device; for a CPU its tensors are replaced by fake ones.
    """
    if device == "cuda":
        yield torch.device("meta")
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):  # the schedule of the noise is a tensor
            _replace_tensors(model, torch.device("cpu"))
            yield torch.device("cpu")


def _replace_tensors(model: nn.Module, device: torch.device) -> None:
    """Put empty parameters and buffers on `device`; shared ones stay shared."""
    made: dict[int, Tensor] = {}

    def replaced(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return made[id(tensor)]

    parameters: dict[int, nn.Parameter] = {}
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = parameters.setdefault(
                    id(parameter), nn.Parameter(replaced(parameter), parameter.requires_grad)
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = replaced(buffer)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live storages that operations allocated, and FLOPs.

    `now` are those that live, `most` is their peak, `late` the peak since the first call of `mark`.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known` are tensors that are not counted."""
        super().__init__()
        self.now = self.most = self.late = 0
        self._marked = False
        self.flops = 0.0
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
        if (formula := _FORMULAS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        if self._marked:
            self.late = max(self.late, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size

    def mark(self) -> None:
        """Begin `late`; only the first call counts."""
        if not self._marked:
            self._marked, self.late = True, self.now


@dataclass(frozen=True)
class Count:
    """Peak bytes beside the weights, and FLOPs, of one pass."""

    peak: int
    flops: float
    late: int = 0  # the peak once the first gradient of a weight was complete


def count_training(model: nn.Module, step: Callable[[], Tensor]) -> Count:
    """Count the forward and backward pass of a loss.

    A gradient is freed as soon as it is complete, as ZeRO-2 does when it has put it into a bucket.
    """
    live = _live(model)

    def complete(parameter: Tensor) -> None:
        live.mark()
        forget_gradient(parameter)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(complete) for parameter in trained]
    with _kernels(model), live:
        step().backward()
    for hook in hooks:
        hook.remove()
    return Count(live.most, live.flops, live.late)


def count_inference(model: nn.Module, work: Callable[[], object]) -> Count:
    """Count a pass without gradients."""
    with torch.no_grad(), _kernels(model), _live(model) as live:
        result = work()
    del result
    return Count(live.most, live.flops)


def _live(model: nn.Module) -> LiveTensors:
    return LiveTensors([*model.parameters(), *model.buffers()])


def _kernels(model: nn.Module) -> Any:
    """On the meta device: attention as on CUDA; elsewhere torch's own choice."""
    return _fused_attention(model) if next(model.parameters()).is_meta else nullcontext()


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
    found: list[Any] = [getattr(part, "config", None) for part in model.modules()]
    configs = [config for config in found if hasattr(config, "_attn_implementation")]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = "counted"
    original, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
