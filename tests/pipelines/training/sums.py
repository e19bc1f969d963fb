"""Prints, for some stages of ZeRO (`2`, or `2-offload`), the sum of gradients that bfloat16 cannot hold: a JSON object.

Of 128 micro-batches the first has a gradient of 256, all others of 1; the sum is taken of a 128th of
each. In bfloat16 it stays at 2, where 1/128 is less than half of the least difference.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from torch import Tensor, nn

TERMS = [256.0] + 127 * [1.0]
SUM = sum(TERMS) / len(TERMS)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return (self.weight * pixel_values.to(self.weight.dtype)).sum() / 4


def main(settings: list[str]) -> None:
    import deepspeed

    from pipelines.training.config import TrainConfig
    from pipelines.training.engine import start_engine
    from pipelines.training.stages import Stage

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    found = {}
    for setting in settings:
        stage, _, offload = setting.partition("-")
        train = TrainConfig(
            use_gpu=False, precision="bfloat16", zero_stage=int(stage), max_grad_norm=0,
            global_batch_size=len(TERMS), micro_batch_size=1, offload_optimizer=bool(offload),
        )  # fmt: skip
        product = Stage("stage1", Product(), prepare=lambda batch: batch, random_init=("weight",))
        engine = start_engine(product, train, world_size=1)
        for term in TERMS:
            engine.backward(engine(pixel_values=torch.full((4,), 4 * term)))
            engine.step()
        found[setting] = float(engine.get_global_grad_norm()) / 2  # of four equal gradients
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
