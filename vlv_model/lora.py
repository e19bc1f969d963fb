"""Low-rank adapters (LoRA, arXiv 2106.09685) on the caption decoder, by peft.

An adapted linear layer has a frozen `base_layer` and two trained matrices, `lora_A` `[rank in]` and
`lora_B` `[out rank]`; their product is scaled by alpha / rank. Merging adds the product to the
weight and restores the plain layer. In files the base weights keep the plain model's names.
"""

from __future__ import annotations

import torch
from torch import nn

from vlv_model.config import Lora

PART = "language_model"  # the only part of a captioner with adapters


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def name_in_file(name: str) -> str:
    """The name of a parameter in a file: for base weights, their name in the plain model."""
    return name.replace(".base_layer.", ".")


def belongs_in_file(name: str, lora: Lora) -> bool:
    """Whether a checkpoint of a run with `lora` may contain a parameter of this name.

    With adapters it contains them instead of the language model's weights.
    """
    return is_adapter(name) == (lora.rank > 0 and name.startswith(f"{PART}."))


def add_adapters(model: nn.Module, lora: Lora, seed: int) -> None:
    """Add adapters to `model`'s layers in place, random from `seed`. `lora_B` starts at zero."""
    from peft import LoraConfig, inject_adapter_in_model  # a slow import, needed for LoRA only

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def train_only_adapters(model: nn.Module) -> None:
    """Stop gradients to all parameters but the adapters', if `model` has adapters."""
    named = dict(model.named_parameters())
    if any(map(is_adapter, named)):
        for name, parameter in named.items():
            parameter.requires_grad_(is_adapter(name))


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the base weights and remove them, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
