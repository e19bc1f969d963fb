"""The counting mode: live tensors, FLOPs, and as many bytes as torch's allocator gives out."""

import pytest
import torch
from torch import Tensor

from benchmarks.training.memory import peak_on_cpu
from benchmarks.training.models import SIZES
from pipelines.estimate.counting import LiveTensors, count_inference, count_training, without_data
from vlv_model.autoencoder import VLVAutoEncoder
from vlv_model.checkpoints.skeleton import build_autoencoder, prompt_tokenizer

TINY = SIZES["tiny"]


def test_a_tensor_counts_from_allocation_until_freed() -> None:
    weight = torch.zeros(100)
    with LiveTensors([weight]) as live:
        first = weight + 1  # 400 bytes
        view = first[10:]
        del first
        second = view * 2 + 1  # 360 of the product that goes, 360 that stay
        assert live.now == 400 + 360
        del view
        assert live.now == 360
        assert (second is not None, live.most) == (True, 400 + 2 * 360)


def test_flops_of_products_are_counted() -> None:
    layer = torch.nn.Linear(8, 16, device="meta")
    count = count_inference(layer, lambda: layer(torch.zeros(4, 8, device="meta")))
    assert (count.flops, count.peak) == (2 * 4 * 8 * 16, 4 * (4 * 8 + 4 * 16))


def step_of(model: VLVAutoEncoder, device: torch.device) -> Tensor:
    latents = torch.zeros(2, *model.latent_shape, device=device)
    side = TINY.image_size
    return model(
        pixel_values=torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device),
        noise=latents,
        timesteps=torch.zeros(2, dtype=torch.long, device=device),
        posterior_noise=latents,
    )


def built(device: torch.device) -> VLVAutoEncoder:
    tokenizer = prompt_tokenizer(TINY.model.model_copy(update={"florence": "any/name"}))
    return build_autoencoder(TINY.model, TINY.configs, tokenizer, device).train()


def test_the_count_without_data_equals_the_allocators_peak() -> None:
    counted = {}
    for kind in ("cuda", "cpu"):
        model = built(torch.device("meta"))
        with without_data(kind, model) as device:
            counted[kind] = count_training(model, lambda m=model, d=device: step_of(m, d))
    real = built(torch.device("cpu"))
    computed = count_training(real, lambda: step_of(real, torch.device("cpu")))
    assert counted["cpu"].peak == pytest.approx(computed.peak, rel=1e-4)  # but for scalars
    assert counted["cpu"].flops == computed.flops
    step_of(real, torch.device("cpu")).backward()  # gradients are there: they do not count
    peak = peak_on_cpu(lambda: step_of(real, torch.device("cpu")).backward())
    assert counted["cpu"].peak == pytest.approx(peak, rel=0.02)
    # CUDA's attention keeps no scores either; of convolutions a CPU holds copies in another order.
    assert counted["cuda"].peak == pytest.approx(peak, rel=0.1)
    assert counted["cuda"].flops == pytest.approx(computed.flops, rel=0.01)
