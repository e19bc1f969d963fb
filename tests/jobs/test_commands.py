"""`vlv JOB …` is `python jobs/JOB.py …`, and a shell completes it."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import main
from pipelines.cli.commands import jobs_in
from pipelines.cli.completion import completion
from tests.jobs.conftest import ROOT


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vlv", *words])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_every_job_is_a_subcommand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch) == 0
    listed = capsys.readouterr().out
    jobs = jobs_in(ROOT / "jobs")
    for job, file in jobs.items():
        assert f"  {job} " in listed
        assert file.is_file()
    assert {"ingest", "caption", "recaption", "stage1"} <= jobs.keys()


def test_a_subcommand_is_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = []
    monkeypatch.chdir(tmp_path)  # its recipes are found from any folder
    words = ["data.input=/i", "data.output=/o", "--config", "jobs/configs/full/recaption.yaml"]
    for how in ("command", "script"):
        if how == "command":
            status = command(monkeypatch, "recaption", *words, "--print-config")
        else:
            words[-1] = str(ROOT / words[-1])
            script = str(ROOT / "jobs/recaption.py")
            monkeypatch.setattr(sys, "argv", [script, *words, "--print-config"])
            with pytest.raises(SystemExit) as left:
                runpy.run_path(script, run_name="__main__")
            status = int(left.value.code or 0)
        ended.append((status, capsys.readouterr()))
    assert ended[0] == ended[1]
    assert ended[0][0] == 0
    assert command(monkeypatch, "status", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: vlv status TABLE ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["injest"], "there is no job 'injest': did you mean 'ingest'?"),
        (["status"], "setting 'table' is required"),
        (["completion", "tcsh"], "expected `vlv completion bash` or `vlv completion zsh`"),
    ],
)
def test_a_wrong_command_is_one_line(
    words: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, *words) == 2
    ended = capsys.readouterr()
    assert (ended.out, ended.err.count("\n")) == ("", 1)
    assert line in ended.err


def test_a_shell_completes_jobs_settings_and_leaves_files_alone() -> None:
    script = completion("bash", {"ingest": ["--help", "data.input=", "ray.address="], "status": []})

    def completed(*words: str) -> list[str]:
        shown = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _vlv; "
        shown += 'echo "${COMPREPLY[@]}"'
        ended = subprocess.run(["bash", "-c", script + shown], capture_output=True, text=True)
        assert ended.stderr == ""
        return ended.stdout.split()

    assert completed("vlv", "st") == ["status"]
    assert completed("vlv", "ingest", "da") == ["data.input="]
    assert completed("vlv", "ingest", "--") == ["--help"]
    assert completed("vlv", "ingest", "data.input", "=", "ra") == []  # a file


def test_completion_knows_the_settings_of_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "completion", "bash") == 0
    (line,) = [
        x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("recaption)")
    ]
    assert {"--model", "--format", "generate.num_beams=", "data.input="} <= set(
        line.split('"')[1].split()
    )


def test_make_help_names_every_target_with_a_purpose() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {"demo", "test", "check", "clean"} <= {line.split()[1] for line in shown.splitlines()}
