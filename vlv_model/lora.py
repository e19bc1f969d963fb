"""Low-rank adapters (LoRA, arXiv 2106.09685) upon the caption decoder, through peft.

Each adapted linear layer becomes peft's: the frozen `base_layer`, and beside it what is trained,
`lora_A` `[rank in]` and `lora_B` `[out rank]`, whose product counts by alpha / rank. Merged, the
product is added to the weight and the model is a plain one again. Files have the names of a plain
model's weights, and the adapters' own beside them.
"""

from __future__ import annotations

import torch
from torch import nn

from vlv_model.config import Lora

PART = "language_model"  # of a captioner: the only one with adapters


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def name_in_file(name: str) -> str:
    """The name of a parameter in a file: that of a plain model, for what is no adapter's."""
    return name.replace(".base_layer.", ".")


def belongs_in_file(name: str, lora: Lora) -> bool:
    """Whether a checkpoint of a training with `lora` may hold a parameter of this name.

    With adapters it holds them in the language model's place, without them none.
    """
    return is_adapter(name) == (lora.rank > 0 and name.startswith(f"{PART}."))


def add_adapters(model: nn.Module, lora: Lora, seed: int) -> None:
    """Put adapters upon `model`'s layers, in place: random from `seed`, and without effect yet."""
    from peft import LoraConfig, inject_adapter_in_model  # here: only who uses it waits for it

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def train_adapters_alone(model: nn.Module) -> None:
    """Take the gradients from all but the adapters; a model without any stays as it is."""
    named = dict(model.named_parameters())
    if any(map(is_adapter, named)):
        for name, parameter in named.items():
            parameter.requires_grad_(is_adapter(name))


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the weights that they lie upon and take them out, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
