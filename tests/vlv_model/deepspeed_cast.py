"""What DeepSpeed does to a module whose precision is bfloat16."""

import torch


def cast_parameters(module: torch.nn.Module) -> None:
    """Cast each parameter; buffers stay in float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
