"""The machines' image: the Dockerfile passes hadolint and the lock matches pyproject.toml."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.kubernetes import ray_version

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/Dockerfile"
LOCK = (ROOT / "cluster/requirements.lock").read_text()
LOCKED = dict(re.findall(r"^([a-z0-9][\w.-]*)==(\S+)", LOCK, re.MULTILINE))


def instructions() -> list[tuple[str, str]]:
    """(NAME, arguments) of the Dockerfile, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if rest]


def test_hadolint_passes() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed: pip install -e '.[dev]'")
    done = subprocess.run([hadolint, "-f", "json", DOCKERFILE], capture_output=True, text=True)
    assert json.loads(done.stdout) == []


def test_the_user_is_not_root() -> None:
    assert [rest for name, rest in instructions() if name == "USER"][-1] == "1000:1000"


def test_it_sets_no_secret_and_turns_tokens_on() -> None:
    settings = " ".join(rest for name, rest in instructions() if name in ("ENV", "ARG"))
    names = re.findall(r"(\w+)=", settings)
    assert not [name for name in names if re.search("KEY|SECRET|PASSWORD|TOKEN$", name)]
    assert "RAY_AUTH_MODE=token" in settings


def test_every_package_comes_from_the_lock_by_its_hash() -> None:
    lines = [rest for name, rest in instructions() if "pip install" in rest]
    calls = [call for line in lines for call in re.findall(r"pip install ([^&;]*)", line)]
    (without,) = [call for call in calls if "--require-hashes --no-deps" not in call]
    assert len(calls) > 1
    # The image without CUDA has torch from the one index that offers it.
    assert without.split()[:3] == [
        "--no-deps",
        "--index-url",
        "https://download.pytorch.org/whl/cpu",
    ]
    entries = re.split(r"^(?=[a-z0-9])", LOCK, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    assert len(entries) == len(LOCKED)
    assert {"setuptools", "packaging"} <= LOCKED.keys()  # what DeepSpeed is built with


def test_the_image_without_cuda_has_all_else_of_the_lock(tmp_path: Path) -> None:
    """Runs the Dockerfile's commands on the lock, except pip."""
    (line,) = [rest for name, rest in instructions() if 'TORCH" = cpu' in rest]
    for name in ("requirements.lock", "cpu.lock"):
        line = line.replace(f"/opt/{name}", str(tmp_path / name))
    (tmp_path / "requirements.lock").write_text(LOCK)
    fake = tmp_path / "pip"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH": "cpu"}
    subprocess.run(["sh", "-ec", line], check=True, env=environment)
    asked = (tmp_path / "asked").read_text().split()
    assert asked[-1] == f"torch=={LOCKED['torch']}"
    left = (tmp_path / "requirements.lock").read_text()
    kept = dict(re.findall(r"^([a-z0-9][\w.-]*)==(\S+)", left, re.MULTILINE))
    gone = LOCKED.keys() - kept.keys()
    assert kept.items() <= LOCKED.items()
    assert {"torch", "triton", "nvidia-cublas", "nvidia-nccl-cu13", "cuda-toolkit"} <= gone
    assert all(
        name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-")) for name in gone
    )
    assert left.count("--hash=sha256:") > len(kept)


def test_the_lock_holds_every_dependency_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["gcs"], *extras["aws"], *extras["gcp"]]
    for requirement in map(Requirement, asked):
        version = LOCKED.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in the lock: make lock"
        assert requirement.specifier.contains(version), f"{requirement}, locked {version}"
    assert ray_version() == LOCKED["ray"]


def test_the_build_context_has_only_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    copies = [rest.split() for name, rest in instructions() if name == "COPY"]
    sources = {words[-2] for words in copies if not words[0].startswith("--from")}
    assert rules[0] == "*"
    assert sources == let_in
    assert all((ROOT / source).exists() for source in sources)


def test_it_has_the_programs_that_others_call() -> None:
    """Probes call wget, the log sidecar rsync, and Ray's launcher ssh and rsync on the head."""
    (line,) = [rest for name, rest in instructions() if "ca-certificates" in rest]
    pods = (ROOT / "cluster/kuberay/raycluster.yaml").read_text()
    assert "wget" in pods
    assert "rsync" in pods
    assert {"wget", "rsync", "openssh-client"} <= set(line.split())
    (secrets,) = [rest for name, rest in instructions() if "vlv_secrets.py" in rest]
    assert secrets.endswith("/opt/vlv/bin/vlv-secrets")  # on PATH, as the launcher's files call it
