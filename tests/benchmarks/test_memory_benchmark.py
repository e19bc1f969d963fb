"""The memory estimate: it counts live tensors, and as many as on a CPU."""

import pytest
import torch

from benchmarks.training import models
from benchmarks.training.memory import LiveTensors, Setup, live_bytes, memory
from benchmarks.training.models import SIZES
from vlv_model.autoencoder import VLVAutoEncoder

TINY = SIZES["tiny"]


def test_a_tensor_counts_from_allocation_until_freed() -> None:
    weight = torch.zeros(100)
    with LiveTensors(iter([weight])) as live:
        first = weight + 1  # 400 bytes
        view = first[10:]
        del first
        second = view * 2 + 1  # 360 of the product that goes, 360 that stay
        assert live.now == 400 + 360
        del view
        assert live.now == 360
        assert (second is not None, live.most) == (True, 400 + 2 * 360)


def step_of(model: VLVAutoEncoder, device: torch.device) -> torch.Tensor:
    latents = torch.zeros(2, *model.latent_shape, device=device)
    side = TINY.image_size
    return model(
        pixel_values=torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device),
        noise=latents,
        timesteps=torch.zeros(2, dtype=torch.long, device=device),
        posterior_noise=latents,
    )


def test_the_count_on_the_meta_device_equals_a_cpus() -> None:
    """Whose attention keeps no scores either; of convolutions it holds copies in another order."""
    counted = {}
    for device in (torch.device("meta"), torch.device("cpu")):
        model = models.autoencoder(TINY, device).train()
        counted[device.type] = live_bytes(model, lambda m=model, d=device: step_of(m, d))
    assert counted["meta"] == pytest.approx(counted["cpu"], rel=0.15)


@pytest.mark.faults  # full size, if on no device
def test_fewer_rows_fewer_activations_and_shares_of_states() -> None:
    few = memory(Setup("stage1", micro_batch=1))
    alone = memory(Setup("stage1", micro_batch=2, workers=1))
    assert alone.activations == pytest.approx(2 * few.activations, rel=0.1)
    assert alone.optimizer == pytest.approx(8 * few.optimizer, rel=0.15)  # rounded to a tenth
    assert few.weights == alone.weights
