"""Counting an update's operations: what is trained, what is frozen, what is padding."""

import pytest
import torch
from torch import nn

from pipelines.estimate.flops import count_flops, matrix_rate


class Chain(nn.Module):
    """A frozen layer without a gradient, a trained one, and a frozen one that passes it through."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.trained, self.after = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.before.requires_grad_(False)
        self.after.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.after(self.trained(self.before(pixel_values))).mean()


def test_frozen_parts_count_without_weight_gradients() -> None:
    model = Chain().train()
    product = 2 * 8 * 8
    found = count_flops(model, {"pixel_values": torch.randn(4, 8)})
    # Forward three times; weights' gradient of one layer; activations' gradient of the last alone.
    assert found.per_image == 5 * product
    assert found.of(images=10) == 50 * product
    assert model.training
    assert model.trained.weight.grad is None


def test_each_weight_gradient_is_freed_at_once() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    together: list[int] = []

    def count(_: torch.Tensor) -> None:
        together.append(sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values).sum()

    count_flops(Loss(), {"pixel_values": torch.randn(2, 8)})
    assert together == [1] * 8


class Reader(nn.Module):
    """A part per image and a part per token."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(8, 8, bias=False)
        self.token = nn.Linear(4, 4, bias=False)

    def forward(self, pixel_values, input_ids, attention_mask, labels) -> torch.Tensor:
        tokens = self.token(input_ids.float()[..., None].expand(-1, -1, 4))
        return self.image(pixel_values).mean() + tokens.mean()


def test_captions_count_by_their_own_tokens() -> None:
    labels = torch.tensor([[5, 6, 7, -100, -100], [1, 2, 3, 4, 5]])
    inputs = {"input_ids": labels.abs(), "attention_mask": (labels >= 0).long(), "labels": labels}
    found = count_flops(Reader(), {"pixel_values": torch.randn(2, 8), **inputs})
    assert found.per_token == 2 * (2 * 4 * 4)  # forward, and the gradient of the weights
    assert found.per_image == 2 * (2 * 8 * 8)


def test_attention_counts_on_cpus_too() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 2, 16, 8))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(
                self.query, pixel_values, pixel_values
            ).mean()

    found = count_flops(Attention(), {"pixel_values": torch.randn(1, 2, 16, 8)})
    assert found.per_image == 3 * (2 * 2 * 16 * 16 * 8 * 2)  # backward is twice forward


def test_the_rate_of_matrix_products_is_measured() -> None:
    assert matrix_rate(torch.device("cpu"), seconds=0.01) > 1e8


@pytest.mark.gpu
def test_gpu_rate_is_measured_in_bfloat16() -> None:
    assert matrix_rate(torch.device("cuda")) > 1e12
