"""Extractors' tiny folders, and jobs in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.cli.config import load
from pipelines.embed.config import EmbedConfig
from pipelines.embed.job import embed
from tests.tiny_extractors import WIDTH, write_clip

Embed = Callable[..., str]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> str:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip", tiny_models / "diffusion/tokenizer")


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An aesthetic head, v1, whose scores are spread around 5."""
    file = tmp_path_factory.mktemp("head") / "v1.pth"
    weight = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0)) * 40
    torch.save({"weight": weight, "bias": torch.tensor([5.0])}, file)
    return str(file)


@pytest.fixture
def run(tmp_path: Path) -> Embed:
    """Runs the job without Ray; returns the folder of its table."""

    def run(source: Any, name: str, *settings: str) -> str:
        output = str(tmp_path / name)
        given = [f"data.input={source}", f"data.output={output}", "ray.address=in-process"]
        embed(load(EmbedConfig, None, [*given, "actors.use_gpu=false", *settings]))
        return output

    return run
