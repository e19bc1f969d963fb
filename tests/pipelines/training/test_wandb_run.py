"""W&B follows the environment, and its failures do not stop training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.metrics import MetricsSink
from pipelines.training.wandb_run import start_wandb, wandb_mode
from vlv_model.errors import ConfigError

KEY = "a" * 40
CONFIG: dict[str, Any] = {"train": {"wandb": "auto", "wandb_project": "vlv", "steps": 1}}


@pytest.fixture(autouse=True)
def nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key and no mode; the server's port is closed."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


@pytest.mark.parametrize(
    ("asked", "setting", "key", "mode"),
    [
        (None, "auto", False, "offline"),
        (None, "auto", True, "online"),
        (None, "offline", True, "offline"),
        ("offline", "auto", True, "offline"),
        ("dryrun", "auto", True, "offline"),
        ("online", "offline", True, "online"),
        ("disabled", "auto", True, "disabled"),
        ("online", "disabled", True, "disabled"),
    ],
)
def test_wandb_mode_in_the_environment_overrides_the_setting(
    asked: str | None, setting: str, key: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked:
        monkeypatch.setenv("WANDB_MODE", asked)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode(setting) == mode


def test_an_unknown_mode_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "off")
    with pytest.raises(
        ConfigError, match=r"WANDB_MODE='off' in the environment: expected online, "
    ):
        wandb_mode("auto")


@pytest.mark.parametrize("named", [False, True])
def test_the_key_of_wandb_login_is_found(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ("mine" if named else ".netrc")
    if named:
        monkeypatch.setenv("NETRC", str(file))
    file.write_text(f"machine api.example.org login user password {KEY}\n")
    file.chmod(0o600)
    assert wandb_mode("auto") == "offline"  # of another server
    file.write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
    assert wandb_mode("auto") == "online"
    file.write_text("machine\n")
    assert wandb_mode("auto") == "offline"


@pytest.mark.parametrize("key", [KEY, "too-short"])
def test_an_unreachable_server_gives_one_warning(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    run = start_wandb(tmp_path, "stage1", CONFIG)
    run.log({"step": 1, "loss": 0.5})
    run.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "is unavailable" in warnings[0]
    assert "written offline" in warnings[0]


class Failing:
    """A W&B run whose process has ended."""

    def log(self, values: dict[str, Any]) -> None:
        raise ConnectionError("the service is gone")


def test_a_later_wandb_failure_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    sink = MetricsSink(None, tmp_path, "stage1", CONFIG)
    sink.run = Failing()
    sink._log({"step": 1})
    assert sink.run is None
    assert capsys.readouterr().err.count("continues without it") == 1
