"""Connecting to Ray: an address where nobody is costs seconds and one line."""

import socket

import pytest

from pipelines.runtime import RayConfig, ray_session
from vlv_model.errors import RunError


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:9{}"])
def test_an_address_without_a_ray_is_one_line(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever other tests hold
    address = address.format(free_port())
    with pytest.raises(RunError) as refused, ray_session(RayConfig(address=address)):
        raise AssertionError("connected to nothing")
    assert str(refused.value).startswith(f"no Ray answers at {address} (")
    assert "leave ray.address and RAY_ADDRESS out" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_environments_address_is_knocked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(RunError, match="no Ray answers"), ray_session(RayConfig()):
        raise AssertionError("connected to nothing")
