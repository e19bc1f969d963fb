"""The run at Weights & Biases: how it is reached, and that it never ends a training.

`WANDB_MODE` in the environment decides before `train.wandb` does. With neither, a run is online
where there is a key: WANDB_API_KEY, or what `wandb login` wrote into the netrc file.
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
_ANSWER_SECONDS = 30.0  # for which a server is waited for at the start; WANDB_INIT_TIMEOUT: another
_END_SECONDS = 300.0  # and at the end, until it has all figures


def start_wandb(run_dir: Path, stage: str, config: dict[str, Any]) -> Any:
    """The W&B run of a training of `config`, or None where it is disabled.

    A server that does not answer, or refuses the key, is one line of warning: the run is then
    written into `run_dir` as an offline one. Raises ConfigError for a WANDB_MODE that is none.
    """
    mode = wandb_mode(config["train"]["wandb"])
    if mode == "disabled":
        return None
    try:
        run = _init(run_dir, stage, config, mode)
    except Exception as error:  # W&B's own are many, and none is worth a training
        if mode == "offline":
            raise
        print(
            f"warning: Weights & Biases cannot be used ({one_line(error)}): this run is written offline "
            f"to {run_dir / 'wandb'}, `wandb sync` sends it later",
            file=sys.stderr,
        )
        run = _init(run_dir, stage, config, "offline")
    # Our own step: W&B's may not go back, as it does after a restart from a checkpoint.
    run.define_metric("*", step_metric="step")
    return run


def give_up(error: Exception) -> None:
    """Say that a run which had begun goes on without W&B."""
    print(
        f"warning: Weights & Biases failed ({one_line(error)}): the training goes on without it, and "
        "its figures stay in metrics.jsonl",
        file=sys.stderr,
    )


def wandb_mode(setting: str) -> str:
    """online, offline, shared or disabled: by WANDB_MODE, else by `train.wandb` and a key.

    What either of the two disables is disabled. Raises ConfigError for a WANDB_MODE that is none.
    """
    asked = os.environ.get("WANDB_MODE", "").strip()
    if asked and asked not in _MODES:
        raise ConfigError(
            f"WANDB_MODE={asked!r} in the environment: expected {', '.join(_MODES)}, or leave it out"
        )
    if setting == "disabled":
        return setting
    if asked:
        return _MODES[asked]
    return "online" if setting == "auto" and _has_key() else "offline"


def _has_key() -> bool:
    """Whether there is an API key for the server: in the environment, or by `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    host = urlsplit(wandb.setup().settings.base_url).netloc
    homes = [Path.home() / name for name in (".netrc", "_netrc")]
    named = os.environ.get("NETRC")
    for file in [Path(named).expanduser()] if named else homes:
        try:
            found = netrc.netrc(file).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return True
    return False


def _init(run_dir: Path, stage: str, config: dict[str, Any], mode: str) -> Any:
    import wandb

    train = config["train"]
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    if mode != "offline":
        settings.finish_timeout = _END_SECONDS
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings.init_timeout = _ANSWER_SECONDS
    return wandb.init(
        project=train["wandb_project"],
        name=train["wandb_name"] or f"{stage}-{run_dir.name}",
        dir=run_dir,
        config=config,
        mode=mode,
        settings=settings,
    )
