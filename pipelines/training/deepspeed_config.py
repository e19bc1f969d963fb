"""The DeepSpeed dictionary, generated from our settings: there is no second file to disagree."""

from __future__ import annotations

from typing import Any

from pipelines.training.config import TrainConfig

BUCKET = 50_000_000
"""Numbers that are reduced or gathered at once. DeepSpeed's default, ten times that, fills 6 GB of a
GPU; links are as busy with a tenth of it."""


def deepspeed_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. The learning rate is not in it: the loop sets it."""
    accumulation = train.accumulation(world_size)
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        # Gradients travel while the backward pass goes on; it needs CUDA's streams.
        "overlap_comm": train.use_gpu,
    }
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": train.use_gpu}
    return {
        "train_batch_size": train.rows_at_once * accumulation * world_size,
        "train_micro_batch_size_per_gpu": train.rows_at_once,
        "gradient_accumulation_steps": accumulation,
        # Without ZeRO, DeepSpeed tells no norm: the loop clips itself.
        "gradient_clipping": train.max_grad_norm if train.zero_stage else 0.0,
        **_precision(train),
        "zero_optimization": zero,
        # We bring torch's AdamW; DeepSpeed's list of tested optimisers leaves it out.
        "zero_allow_untested_optimizer": True,
        # Nor does it want it for offload; its own would have to be compiled on every machine.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def _precision(train: TrainConfig) -> dict[str, Any]:
    """bfloat16 products, and sums of gradients in float32, over micro-batches and workers.

    DeepSpeed (0.19) adds micro-batches up in float32 with its stages 2 and 3 alone: below, it
    refuses that or takes another optimiser, whose states it keeps in another way.
    """
    if train.precision == "float32":
        return {}
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if train.zero_stage >= 2 else {}
    return {"bf16": {"enabled": True}, "communication_data_type": "fp32", **sums}
