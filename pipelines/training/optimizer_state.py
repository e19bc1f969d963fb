"""Gathers and restores the optimiser's state by parameter name, independent of its partitioning.

DeepSpeed flattens, pads and partitions AdamW's moments and the float32 master weights differently for
each ZeRO stage and number of workers. Here they are gathered into one full tensor per name, and
scattered again into any other partitioning, so a run can continue with another number of workers or
stage. `deepspeed.utils` does the gathering; this module adds what it lacks: state before the first
step, ZeRO-3's padding, and runs without ZeRO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as torch names them


def moment_name(parameter: str, moment: str) -> str:
    """The name of a parameter's moment in a file."""
    return f"{parameter}.{moment}"


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters by name, in the same order on all ranks."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The full shape of a parameter, also when ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def initialize_state(engine: Any) -> None:
    """Create AdamW's state, with moments of zero, before the first step.

    DeepSpeed (0.19.8) links moments to parameters after the first step of the first parameter group,
    when the other groups have none yet, and never links those.
    """
    optimizer = _torch_optimizer(engine)
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    tensors = flat or [p for group in optimizer.param_groups for p in group["params"]]
    for tensor in tensors:
        optimizer.state[tensor] = {
            # torch's fused AdamW needs the step on the weights' device.
            "step": torch.tensor(0.0, device=tensor.device),
            **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def gather_weights(engine: Any, keep: bool) -> dict[str, Tensor]:
    """The full trainable weights by name, float32 copies on the CPU; empty unless `keep`.

    A collective: all ranks must call it. Only the rank that writes them keeps them, to save memory.
    Under bfloat16 these are the master weights, not the module's rounded ones.
    """
    return _gather(engine, None, keep)


def gather_moments(engine: Any, keep: bool) -> dict[str, Tensor]:
    """AdamW's moments by `moment_name`, in their parameters' shapes; see `gather_weights`."""
    moments: dict[str, Tensor] = {}
    for moment in MOMENTS:
        tensors = _gather(engine, moment, keep)
        moments |= {moment_name(name, moment): tensor for name, tensor in tensors.items()}
    return moments


def restore(
    engine: Any, steps: int, weight: Callable[[str], Tensor], state: Callable[[str], Tensor]
) -> None:
    """Load full float32 weights and moments into an engine, as after `steps` updates.

    `weight` returns the tensor of a parameter name, `state` that of a `moment_name`. A collective: all
    ranks must call it with the same tensors. The module's own weights are already loaded.
    """
    for parameter_state in _torch_optimizer(engine).state.values():
        parameter_state["step"].fill_(steps)
    masters = _master_weights(engine)
    for name, parameter in trainable(engine.module):
        _scatter(engine, masters, parameter, None, weight(name))
        for moment in MOMENTS:
            _scatter(engine, masters, parameter, moment, state(moment_name(name, moment)))


def _gather(engine: Any, moment: str | None, keep: bool) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    gathered = {}
    masters = _master_weights(engine)
    for name, parameter in trainable(engine.module):
        if not _is_partitioned(parameter):
            tensor = masters.get(parameter, parameter)
            if moment is not None:
                tensor = _torch_optimizer(engine).state[tensor][moment]
        elif moment is None:
            tensor = safe_get_full_fp32_param(parameter)
        else:
            tensor = safe_get_full_optimizer_state(parameter, moment)
        if keep:
            gathered[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return gathered


def _scatter(
    engine: Any,
    masters: Mapping[nn.Parameter, Tensor],
    parameter: nn.Parameter,
    moment: str | None,
    value: Tensor,
) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not _is_partitioned(parameter):
        target = masters.get(parameter, parameter)
        if moment is not None:
            target = _torch_optimizer(engine).state[target][moment]
        with torch.no_grad():
            target.copy_(value)
    elif hasattr(parameter, "ds_id"):
        # `safe_set_full_…` reads past the end of a tensor that does not divide by the world size.
        part = _padded_part(value, parameter.ds_tensor.numel(), torch.distributed.get_rank())
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, moment)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _padded_part(value: Tensor, numel: int, rank: int) -> Tensor:
    padded = torch.zeros(numel, dtype=value.dtype)
    part = value.flatten()[rank * numel : (rank + 1) * numel]
    padded[: part.numel()] = part
    return padded


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed has partitioned the parameter's master weight and moments."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimiser inside DeepSpeed's wrapper; without ZeRO in float32 there is no wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _master_weights(engine: Any) -> Mapping[nn.Parameter, Tensor]:
    """Without ZeRO in bfloat16: the float32 master of each weight; otherwise empty."""
    groups = getattr(engine.optimizer, "fp16_groups", None)
    masters = getattr(engine.optimizer, "fp32_groups", None)
    if groups is None or masters is None:
        return {}
    return {
        low: high
        for lows, highs in zip(groups, masters, strict=True)
        for low, high in zip(lows, highs, strict=True)
    }
