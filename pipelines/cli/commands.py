"""The command `vlv`: the scripts of a folder as subcommands, and their completion by a shell."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.cli.completion import SHELLS, completion
from pipelines.cli.main import BAD_INPUT, as_subcommand


def jobs_in(folder: Path) -> dict[str, Path]:
    """The scripts of a folder by the name of their command."""
    return {f.stem.replace("_", "-"): f for f in sorted(folder.glob("*.py")) if f.stem[0] != "_"}


def run_command(folder: Path) -> None:
    """Run the script in `folder` that the command line names; exits with its status."""
    jobs = jobs_in(folder)
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: vlv JOB [key=value ...]      vlv JOB --help lists a job's settings\n")
        for job, file in jobs.items():
            print(f"  {job:<14} {_summary(file)}")
        print(
            f"  {'completion':<14} Print the completion of these commands for {' or '.join(SHELLS)}."
        )
    elif name == "completion" and len(words) == 1 and words[0] in SHELLS:
        print(completion(words[0], {job: _words(job, file) for job, file in jobs.items()}), end="")
    elif name == "completion":
        sys.exit(_refuse(f"expected `vlv completion {'` or `vlv completion '.join(SHELLS)}`"))
    elif name in jobs:
        _run(name, jobs[name], words)
    else:
        near = difflib.get_close_matches(name, jobs, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "vlv --help lists all"
        sys.exit(_refuse(f"there is no job '{name}': {hint}"))


def _run(job: str, file: Path, words: Sequence[str]) -> None:
    # A shipped recipe (`jobs/configs/…`) is found wherever the jobs are installed.
    start, home = f"{file.parent.name}/configs/", file.parent.parent
    found = [str(home / w) if w.startswith(start) and not Path(w).exists() else w for w in words]
    sys.argv = [str(file), *found]
    with as_subcommand(f"vlv {job}"):
        runpy.run_path(str(file), run_name="__main__")


def _summary(file: Path) -> str:
    return re.search(r'"""(.+)', file.read_text())[1].removesuffix('"""')  # type: ignore[index]


def _words(job: str, file: Path) -> list[str]:
    """The options and settings of a job, from its help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _run(job, file, ["--help"])
    options = re.findall(r"^  (--[a-z-]+)", text.getvalue(), re.MULTILINE)
    return options + [f"{key}=" for key in re.findall(r"^  ([a-z_.]+) \(", text.getvalue(), re.M)]


def _refuse(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return BAD_INPUT
