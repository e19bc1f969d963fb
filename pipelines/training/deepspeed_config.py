"""DeepSpeed's configuration, generated from our settings, so that the two cannot disagree."""

from __future__ import annotations

from typing import Any

from pipelines.training.config import TrainConfig

BUCKET = 50_000_000
"""Elements reduced or gathered at once. DeepSpeed's default of ten times as many takes 6 GB of GPU
memory and is not faster."""


def deepspeed_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """The `config` of `deepspeed.initialize`, without the learning rate, which the loop sets."""
    accumulation = train.accumulation(world_size)
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        # Reduces gradients during the backward pass; needs CUDA streams.
        "overlap_comm": bool(train.use_gpu),
    }
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": bool(train.use_gpu)}
    return {
        "train_batch_size": train.rows_at_once * accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.rows_at_once,
        "gradient_accumulation_steps": accumulation,
        # Without ZeRO, DeepSpeed does not return the norm, so the loop clips.
        "gradient_clipping": train.max_grad_norm if train.zero_stage else 0.0,
        **_precision(train),
        "zero_optimization": zero,
        # torch's AdamW is not in DeepSpeed's list of tested optimisers.
        "zero_allow_untested_optimizer": True,
        # Allow it for offload too: DeepSpeedCPUAdam would have to be compiled on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def _precision(train: TrainConfig) -> dict[str, Any]:
    """bfloat16 compute with gradients accumulated and reduced in float32.

    DeepSpeed (0.19) accumulates in float32 only at ZeRO stages 2 and 3. Below, it refuses the
    setting or wraps the optimiser in another class, whose state has another layout.
    """
    if train.precision == "float32":
        return {}
    accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if train.zero_stage >= 2 else {}
    return {"bf16": {"enabled": True}, "communication_data_type": "fp32", **accumulation}
