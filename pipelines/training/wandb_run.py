"""The run at Weights & Biases; its failures never stop a training.

`WANDB_MODE` in the environment overrides `train.wandb`. With neither, a run is online if there is an
API key: WANDB_API_KEY, or the netrc entry that `wandb login` writes.
"""

from __future__ import annotations

import netrc
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vlv_model.errors import ConfigError, one_line

_MODES = {"online": "online", "offline": "offline", "disabled": "disabled"}
_MODES |= {"run": "online", "dryrun": "offline", "shared": "shared"}  # W&B's other names
_INIT_SECONDS = 30.0  # timeout of the start; WANDB_INIT_TIMEOUT overrides it
_FINISH_SECONDS = 300.0  # timeout of the last upload


def start_wandb(run_dir: Path, stage: str, config: dict[str, Any]) -> Any:
    """Start the W&B run of a training with `config`; None when W&B is disabled.

    If the server does not answer or refuses the key, prints a warning and starts an offline run in
    `run_dir`. Raises ConfigError for an unknown WANDB_MODE.
    """
    mode = wandb_mode(config["train"]["wandb"])
    if mode == "disabled":
        return None
    try:
        run = _init(run_dir, stage, config, mode)
    except Exception as error:  # W&B has many error classes; none should stop a training
        if mode == "offline":
            raise
        print(
            f"warning: Weights & Biases is unavailable ({one_line(error)}): this run is written offline "
            f"to {run_dir / 'wandb'}; upload it later with `wandb sync`",
            file=sys.stderr,
        )
        run = _init(run_dir, stage, config, "offline")
    # A step of our own, since W&B's cannot go back, as after a restart from a checkpoint.
    run.define_metric("*", step_metric="step")
    return run


def warn_failed(error: Exception) -> None:
    """Print that the training continues without W&B."""
    print(
        f"warning: Weights & Biases failed ({one_line(error)}): the training continues without it; "
        "metrics.jsonl has all metrics",
        file=sys.stderr,
    )


def wandb_mode(setting: str) -> str:
    """online, offline, shared or disabled: from WANDB_MODE, else from `train.wandb` and the API key.

    Either of the two can disable W&B. Raises ConfigError for an unknown WANDB_MODE.
    """
    mode = os.environ.get("WANDB_MODE", "").strip()
    if mode and mode not in _MODES:
        raise ConfigError(
            f"WANDB_MODE={mode!r} in the environment: expected {', '.join(_MODES)}, or leave it out"
        )
    if setting == "disabled":
        return setting
    if mode:
        return _MODES[mode]
    return "online" if setting == "auto" and _has_key() else "offline"


def _has_key() -> bool:
    """Whether the environment or the netrc file has an API key for the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    host = urlsplit(wandb.setup().settings.base_url).netloc
    default_files = [Path.home() / name for name in (".netrc", "_netrc")]
    netrc_file = os.environ.get("NETRC")
    for file in [Path(netrc_file).expanduser()] if netrc_file else default_files:
        try:
            entry = netrc.netrc(file).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return True
    return False


def _init(run_dir: Path, stage: str, config: dict[str, Any], mode: str) -> Any:
    import wandb

    train = config["train"]
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    if mode != "offline":
        settings.finish_timeout = _FINISH_SECONDS
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings.init_timeout = _INIT_SECONDS
    return wandb.init(
        project=train["wandb_project"],
        name=os.environ.get("WANDB_NAME") or f"{stage}-{run_dir.name}",
        dir=run_dir,
        config=config,
        mode=mode,
        settings=settings,
    )
