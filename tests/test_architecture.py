"""The house: imports point one way, jobs → pipelines → vlv_model."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GROUP_OF

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "vlv_model": {"vlv_model"},
    "pipelines": {"pipelines", "vlv_model"},
    "jobs": {"pipelines", "vlv_model"},
}
ROOMS = [
    "storage",
    "cli",
    "pictures",
    "images",
    "lists",
    "execution",
    "report",
    "estimate",
    "ingest",
    "precompute",
    "embed",
    "reconstruct",
    "recaption",
    "evaluate",
    "publish",
    "training",
    "export",
    "admin",
    "tiny_world",
    "demo",
]
"""Of `pipelines`, from the ground up: each may import those before it."""
NOT_IN_VLV_MODEL = {"ray", "deepspeed", "wandb", "pyarrow", "aiohttp"}
HEAVY = {"torch", "transformers", "diffusers", "jinja2", "huggingface_hub.repocard"}


def imported(file: Path) -> set[str]:
    """Top-level names of everything that a file imports, anywhere in it."""
    return {name.split(".")[0] for name in modules(file)}


def modules(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_no_arrow_turns_back(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        ours = imported(file) & {"vlv_model", "pipelines", "jobs", "tests", "benchmarks"}
        assert ours <= ALLOWED[package], f"{file.relative_to(ROOT)} imports {ours}"


def test_every_module_has_a_room_and_imports_only_those_below() -> None:
    package = ROOT / "pipelines"
    assert [file.name for file in package.glob("*.py")] == ["__init__.py"]
    for file in sorted(package.rglob("*/*.py")):
        floor = ROOMS.index(file.relative_to(package).parts[0])
        rooms = {name.split(".")[1] for name in modules(file) if name.startswith("pipelines.")}
        assert rooms <= set(ROOMS[: floor + 1]), file


def test_vlv_model_knows_nothing_of_ray() -> None:
    for file in (ROOT / "vlv_model").rglob("*.py"):
        assert not imported(file) & NOT_IN_VLV_MODEL, file.name


def test_jobs_are_thin() -> None:
    for file in (ROOT / "jobs").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 60, f"{file.name} does more than parse and run"


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        # Each of a job's workers imports what its steps lie in: seconds and 200 MB for torch alone.
        ([f"jobs.{file.stem}" for file in sorted((ROOT / "jobs").glob("*.py"))], HEAVY),
        (["vlv_model.captioner", "vlv_model.encoder"], {"diffusers"}),
    ],
    ids=["jobs", "captioner"],
)
def test_only_what_is_used_is_loaded(modules: list[str], unwanted: set[str]) -> None:
    program = f"import sys, {', '.join(modules)}; print(*{unwanted} & sys.modules.keys())"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.stdout.split(), ended.stderr) == ([], "")


def test_nothing_imports_torchvision() -> None:
    # It has no CPU build, and importing it would pull the CUDA one in.
    for package in ALLOWED:
        for file in (ROOT / package).rglob("*.py"):
            assert "torchvision" not in imported(file), file


def test_every_file_of_a_group_exists() -> None:
    """Or its tests are a group of their own, with a Ray of their own."""
    assert [file for file in GROUP_OF if not (ROOT / "tests" / file).is_file()] == []
