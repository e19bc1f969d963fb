"""The optimiser's state by the names of the parameters, whatever DeepSpeed makes of it in memory.

DeepSpeed flattens, pads and spreads AdamW's moments and the float32 master weights over the workers,
in another way for every ZeRO stage and number of workers. Here they are gathered into one tensor
for each name, in the shape of the parameter, and dealt out again to whatever is there. So a run
goes on with another number of workers and another stage. The functions of `deepspeed.utils` do the
gathering; below them lies only what they leave open: states before the first step, ZeRO-3's
padding, and runs without ZeRO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as torch names them


def state_name(parameter: str, moment: str) -> str:
    """How a moment of a parameter is called in a file."""
    return f"{parameter}.{moment}"


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, by name, in the same order on all ranks."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also of one of which ZeRO-3 left an empty shell."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def begin(engine: Any) -> None:
    """Give AdamW the state that it would make in its first step: moments of zero.

    DeepSpeed links moments with parameters behind the first step of the first group of parameters,
    when those of the others do not exist yet (0.19.8): it never finds them again.
    """
    optimizer = _basic_optimizer(engine)
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    held = flat or [p for group in optimizer.param_groups for p in group["params"]]
    for tensor in held:
        optimizer.state[tensor] = {
            # torch's fused AdamW wants the count beside the weights.
            "step": torch.tensor(0.0, device=tensor.device),
            **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def gather_weights(engine: Any, keep: bool) -> dict[str, Tensor]:
    """The float32 trainable weights, whole, on the CPU, by name; empty where not to `keep`.

    Called by all ranks together, since gathering needs all; kept where they are written, since
    all ranks of a machine could not hold them. Under bfloat16 these are the masters that training
    goes on with, not the rounded weights of the module. The tensors are copies: training may go on.
    """
    return _gather(engine, None, keep)


def gather_moments(engine: Any, keep: bool) -> dict[str, Tensor]:
    """AdamW's moments in the shapes of their parameters, as `gather_weights`, by `state_name`."""
    moments: dict[str, Tensor] = {}
    for moment in MOMENTS:
        found = _gather(engine, moment, keep)
        moments |= {state_name(name, moment): tensor for name, tensor in found.items()}
    return moments


def restore(
    engine: Any, steps: int, weight: Callable[[str], Tensor], state: Callable[[str], Tensor]
) -> None:
    """Put whole float32 weights and moments into an engine, as if it had done `steps` updates.

    `weight` gives the tensor of a parameter's name, `state` that of a `state_name`; all ranks call
    this with the same tensors. The module's own weights were loaded before.
    """
    for held in _basic_optimizer(engine).state.values():
        held["step"].fill_(steps)
    masters = _masters(engine)
    for name, parameter in trainable(engine.module):
        _deal_out(engine, masters, parameter, None, weight(name))
        for moment in MOMENTS:
            _deal_out(engine, masters, parameter, moment, state(state_name(name, moment)))


def _gather(engine: Any, moment: str | None, keep: bool) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    masters = _masters(engine)
    for name, parameter in trainable(engine.module):
        if not _is_spread(parameter):
            tensor = masters.get(parameter, parameter)
            if moment is not None:
                tensor = _basic_optimizer(engine).state[tensor][moment]
        elif moment is None:
            tensor = safe_get_full_fp32_param(parameter)
        else:
            tensor = safe_get_full_optimizer_state(parameter, moment)
        if keep:
            found[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return found


def _deal_out(
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

    if not _is_spread(parameter):
        target = masters.get(parameter, parameter)
        if moment is not None:
            target = _basic_optimizer(engine).state[target][moment]
        with torch.no_grad():
            target.copy_(value)
    elif hasattr(parameter, "ds_id"):
        # `safe_set_full_…` reaches past the end of a tensor that does not divide by the workers.
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
    part = torch.zeros(numel, dtype=value.dtype)
    here = value.flatten()[rank * numel : (rank + 1) * numel]
    part[: here.numel()] = here
    return part


def _is_spread(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps the parameter's masters and moments in pieces of its own."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _basic_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimiser below DeepSpeed's wrapper, which there is not without ZeRO in float32."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _masters(engine: Any) -> Mapping[nn.Parameter, Tensor]:
    """Without ZeRO in bfloat16: the float32 master of each weight. Empty elsewhere."""
    groups = getattr(engine.optimizer, "fp16_groups", None)
    masters = getattr(engine.optimizer, "fp32_groups", None)
    if groups is None or masters is None:
        return {}
    return {
        low: high
        for lows, highs in zip(groups, masters, strict=True)
        for low, high in zip(lows, highs, strict=True)
    }
