"""Two workers train a little with DeepSpeed and save: python deepspeed_checkpoints.py FOLDER.

<FOLDER>/<case>/ gets the checkpoint, and masters.pt with the float32 weights that it stands for.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.multiprocessing as mp
from torch import nn

CASES = {"zero2-float32": (2, False), "zero2-bfloat16": (2, True), "zero3-bfloat16": (3, True)}
WORKERS = 2


class Tied(nn.Module):
    """Odd sizes, a frozen layer, a buffer, and one table under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("counts", torch.arange(4.0))

    def forward(self, ids):
        return self.head(self.frozen(self.inner(self.words(ids)))).square().mean()


def work(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # A store of its own in a file: no port that another test might hold.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS
    )
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for case, (stage, bfloat16) in CASES.items():
        torch.manual_seed(0)
        model = Tied()
        config = {
            "train_batch_size": WORKERS,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": bfloat16},
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
        for _ in range(3):
            engine.backward(engine(torch.tensor([rank, 2])))
            engine.step()
        engine.save_checkpoint(str(folder / case), tag="step_3")
        masters = {"counts": model.counts.clone()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                whole = parameter.detach().clone()
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            masters[name] = whole if full is None else full.detach().clone()
        if rank == 0:
            torch.save(masters, folder / case / "masters.pt")


if __name__ == "__main__":
    # Forked, as this process has all loaded already.
    mp.start_processes(work, args=(Path(sys.argv[1]),), nprocs=WORKERS, start_method="fork")
