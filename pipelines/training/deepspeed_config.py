"""The DeepSpeed dictionary, generated from our settings: there is no second file to disagree."""

from __future__ import annotations

from typing import Any

from pipelines.training.config import TrainConfig


def deepspeed_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. The learning rate is not in it: the loop sets it."""
    accumulation = train.accumulation(world_size)
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": train.use_gpu}
    return {
        "train_batch_size": train.rows_at_once * accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.rows_at_once,
        "gradient_accumulation_steps": accumulation,
        # Without ZeRO, DeepSpeed tells no norm: the loop clips itself.
        "gradient_clipping": train.max_grad_norm if train.zero_stage else 0.0,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "zero_optimization": zero,
        # We bring torch's AdamW; DeepSpeed's list of tested optimisers leaves it out.
        "zero_allow_untested_optimizer": True,
        # Nor does it want it for offload; its own would have to be compiled on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
