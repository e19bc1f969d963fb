"""The kinds of machines and GPUs that a dry run knows."""

import pytest

from cluster.render import read_sizes
from pipelines.cli.config import ConfigError, build
from pipelines.estimate.config import EstimateConfig
from pipelines.estimate.machines import find_machine, gpus


def test_a_machine_and_a_gpu_are_found_by_name() -> None:
    machine = find_machine("G6E.48xlarge")
    assert (machine.gpu.name, machine.gpus, machine.usd_per_hour) == ("L40S", 8, 30.13)
    alone = find_machine(" rtx 6000 ada ")
    assert (alone.name, alone.gpus, alone.usd_per_hour) == ("RTX 6000 Ada", 1, None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("L41", "did you mean L4"),
        ("g6e.48xl", "did you mean g6e.48xlarge"),
        ("?", "expected one of"),
    ],
)
def test_an_unknown_name_gives_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"machine: there is no machine or GPU '.*': {hint}"):
        build(EstimateConfig, {"machine": name})


def test_prices_of_spot_machines_and_of_your_own() -> None:
    machine = find_machine("g6e.4xlarge")
    assert EstimateConfig().usd_per_hour(machine) == 3.0
    assert EstimateConfig(spot=True).usd_per_hour(machine) == pytest.approx(1.2)
    assert EstimateConfig(price=2.0).usd_per_hour(find_machine("L40S")) == 2.0
    assert EstimateConfig().usd_per_hour(find_machine("L40S")) is None


def test_the_clusters_machines_with_gpus_are_known() -> None:
    sizes = read_sizes()
    for group in sizes["groups"].values():
        for name in (group["aws"], group["gcp"]) if group["gpus"] else ():
            machine = find_machine(name)
            assert machine.gpus == group["gpus"]
            assert machine.memory == sizes["machines"][name]["memory"] * 2**30


def test_every_gpu_has_memory_and_speed() -> None:
    for gpu in gpus():
        assert 20e9 < gpu.memory < 300e9
        assert gpu.rates["float32"] <= gpu.rates["tf32"] <= gpu.rates["bfloat16"]
