"""What README and docs name exists: paths, pages, scripts, settings, make targets.

No command is executed. The words of a job's command go through the job's own settings class; the options
of other scripts have to be in the script. All jobs run with jobs/configs/tiny elsewhere in these tests.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Mapping
from glob import glob
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from pipelines.cli import main as frame
from pipelines.cli.config import parse, settings
from vlv_model.config import Config
from vlv_model.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ["*.toml", "Makefile", ".ci/*"] + [
    f"{folder}/**/*{kind}"
    for folder in ("vlv_model", "pipelines", "jobs", "cluster", "benchmarks", "tests")
    for kind in (".py", ".yaml", ".sh", "Dockerfile")
]

NOT_PARSED = {
    ".": "activates an environment of Python",
    "xdg-open": "opens a page in the browser",
    "ray": "needs a cluster; the job that it submits is checked",
    "helm": "needs a Kubernetes cluster",
    "kubectl": "needs a Kubernetes cluster",
    "export": "sets a variable of the shell",
    "pip": "installs packages",
    "python3.11": "makes the environment, as the Makefile does",
    "(printf": "tests/pipelines/lists/test_metadata.py reads a list with this header",
}
"""Commands that are not checked here, by their first word, and why."""

ARGS_GO_TO = {
    "demo": ["python", "jobs/demo.py"],
    "full-size": ["python", "-m", "benchmarks.full_size"],
    "gpu-check": ["python", "-m", "benchmarks.gpu"],
}
"""The commands that get ARGS, by make's target."""

SECTIONS = "data|model|train|estimate|generate|gate|earlier|filter|download|image|duplicates|actors|encode|diffusion"
NOT_SETTINGS = [
    (r".*\.(py|json|safetensors|pt|md|yaml|jsonl|tar)", "a file"),
    (
        r"model\.(language_model\.|vision_tower|image_|visual_).*",
        "weights of published checkpoints",
    ),
    ("key", "stands for any setting"),
    ("on_error", "an option of fsspec"),
]
"""Names in pages that look like settings, and what they are."""
FOLDERS = "pipelines|vlv_model|jobs|cluster|benchmarks|tests|docs"


def fences(text: str, kind: str) -> str:
    """The lines of all fenced blocks of a kind, with continued lines joined."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return re.sub(r"\\\n\s*", "", "".join(blocks))


def inline(text: str) -> list[str]:
    """All inline code of a page, each on one line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(place, words) of every command in a page."""
    for page in PAGES:
        text = page.read_text()
        whole = [code for code in inline(text) if re.match(r"(python|make) \S", code)]
        for line in [*fences(text, "sh").splitlines(), *whole]:
            if words := shlex.split(line, comments=not line.startswith("(printf")):
                yield f"{page.name}: {line}", words


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Config]]:
    """Has every job's script only parse its command line; the settings classes seen, by script."""
    seen: dict[str, type[Config]] = {}

    def only_parse(
        cls: type[Config],
        run: Any,
        description: str,
        aliases: Mapping[str, str] = MappingProxyType({}),
        **_: bool,
    ) -> int:
        seen[sys.argv[0]] = cls
        parse(cls, sys.argv[1:], "", "", aliases)
        return 0

    monkeypatch.setattr(frame, "main", only_parse)
    monkeypatch.chdir(ROOT)
    return seen


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise where a command names a script, setting, option or target that does not exist."""
    while re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
        words = words[1:]
    if words[0] == "make":
        names = [word for word in words[1:] if "=" not in word]
        for name in names:
            assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE), name
        for variable, _, value in (word.partition("=") for word in words if "=" in word):
            assert f"$({variable})" in (ROOT / "Makefile").read_text(), variable
            if variable == "ARGS":
                check([*ARGS_GO_TO[words[1]], *shlex.split(value)], monkeypatch)
        return
    if words[0] == "sbatch":  # sbatch OPTION … cluster/slurm.sh JOB …
        script = next(index for index, word in enumerate(words) if word.endswith(".sh"))
        assert (ROOT / words[script]).is_file(), words[script]
        words = ["vlv", *words[script + 1 :]]
    if words[0] == "vlv":
        words = ["python", f"jobs/{words[1]}.py", *words[2:]]
    if words[0] != "python":
        later = [index for index, word in enumerate(words) if word == "python"]
        assert words[0] in NOT_PARSED or later, f"{words[0]}: explain it in NOT_PARSED"
        return check(words[later[0] :], monkeypatch) if later else None
    script, arguments = words[1], words[2:]
    if script == "-m":
        module, arguments = words[2].replace(".", "/"), words[3:]
        script = f"{module}/__main__.py" if (ROOT / module).is_dir() else f"{module}.py"
    text = (ROOT / script).read_text()
    if "from pipelines.cli.main import" in text:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert ended.value.code == 0
        return None
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in text, f"{script} has no {option}"
    return None


def test_commands_name_scripts_options_and_settings_that_exist(
    parsed: dict[str, type[Config]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, words in commands():
        try:
            check(words, monkeypatch)
        except (ConfigError, AssertionError, OSError) as error:
            pytest.fail(f"{place}: {error}")
    assert {Path(script).stem for script in parsed} > {"ingest", "stage1", "stage2", "recaption"}


def test_commands_that_need_gpus_say_so() -> None:
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            recipes = set(re.findall(r"jobs/configs/full/[\w/]+", block)) - {
                "jobs/configs/full/ingest"
            }
            assert "GPU" in block or not (recipes or "cuda" in block), f"{page.name}: {block}"


def test_a_wrong_setting_is_found(
    parsed: dict[str, type[Config]], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "RAY_AUTH_MODE=token ray job submit -- python jobs/ingest.py data.input=a data.output=b"
    )
    check(shlex.split(command), monkeypatch)
    with pytest.raises(ConfigError, match=r"unknown setting .filter\.min_aesthetics"):
        check(shlex.split(f"{command} filter.min_aesthetics=6"), monkeypatch)
    with pytest.raises(AssertionError, match="no --rounds"):
        check(["python", "benchmarks/faults/chaos.py", "--rounds", "3"], monkeypatch)


def test_settings_that_pages_name_exist(
    parsed: dict[str, type[Config]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = [*(ROOT / "jobs").glob("[!_]*.py")]
    for script in scripts:
        monkeypatch.setattr(sys, "argv", [script.stem])
        with pytest.raises((SystemExit, ConfigError)):
            runpy.run_path(str(script), run_name="__main__")
    known = {setting.key for cls in parsed.values() for setting in settings(cls)}
    assert len(parsed) == len(scripts)
    known |= {name.rpartition(".")[2] for name in known}
    for page in PAGES:
        for code in inline(page.read_text()):
            if code.startswith("unknown setting") or "(" in code:  # an error; a call in Python
                continue
            named = re.findall(rf"(?<![\w./-])(?:{SECTIONS})(?:\.[a-z_0-9]+)+(?![\w/])", code)
            named += re.findall(r"(?<![\w./-])([a-z][a-z_0-9.]*)=", code)
            for name in named:
                other = any(re.fullmatch(pattern, name) for pattern, _ in NOT_SETTINGS)
                assert name in known or other, f"{page.name}: {name} in `{code}`"


def test_paths_that_pages_name_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for code in [*inline(text), *fences(text, "sh").splitlines()]:
            for name in re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]+", code):
                assert glob(str(ROOT / name.rstrip("."))), f"{page.name}: {name}"
        for name, anchor in re.findall(r"\]\(([^:)#]+)(?:#([^)]*))?\)", text):
            target = page.parent / name
            assert target.exists(), f"{page.name}: {name}"
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if anchor else []
            links = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings]
            assert not anchor or anchor in links, f"{page.name}: {name}#{anchor}"


def test_pages_that_code_names_exist() -> None:
    for pattern in SOURCES:
        for file in ROOT.glob(pattern):
            for name in re.findall(r"\bdocs/[a-z]+\.md", file.read_text(errors="replace")):
                assert (ROOT / name).is_file(), f"{file.relative_to(ROOT)}: {name}"


def test_pages_are_short_enough_to_read() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for page in PAGES:
        for line in page.read_text().splitlines():  # a table's row and a command cannot be broken
            assert len(line) <= 120 or line.startswith(("|", "(printf")), f"{page.name}: {line}"
