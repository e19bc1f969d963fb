"""docs/cluster.md names what cluster/ has, and what its pods need. Paths and commands: tests/test_docs.py."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cluster.render import HERE, read_sizes, rendered
from tests.cluster.test_rendered import pods
from tests.test_docs import fences, inline

TEXT = (HERE.parent / "docs/cluster.md").read_text()
SIZES = read_sizes()
CODE = [*inline(TEXT), *fences(TEXT, "sh").splitlines()]


def words(pattern: str) -> set[str]:
    return {found for code in CODE for found in re.findall(pattern, code)}


def test_files_that_are_named_without_their_folder_exist() -> None:
    for name in words(r"(?<![\w/])(?:storage|rayjob|kueue)-\w+\.yaml"):
        assert (HERE / "kuberay" / name).is_file(), name


def test_named_settings_are_in_sizes() -> None:
    named = words(r"site\.([a-z_]+)(?!\w|\*)")
    assert len(named) > 5
    assert named <= SIZES["site"].keys()


@pytest.mark.parametrize(
    "name", ["vlv-group", "vlv-spot", "nvidia.com/gpu", "vlv-secrets", "vlv-shared"]
)
def test_labels_taints_and_secrets_are_documented_and_rendered(name: str) -> None:
    assert any(name in code for code in CODE), name
    assert any(name in text for text in rendered(SIZES).values()), name


def found_in(value: Any, key: str) -> set[str]:
    """All texts under a key, anywhere in a document."""
    if isinstance(value, list):
        return set().union(*(found_in(item, key) for item in value))
    if not isinstance(value, dict):
        return set()
    here = {value[key]} if isinstance(value.get(key), str) else set()
    return here.union(*(found_in(item, key) for item in value.values()))


def test_what_pods_need_is_documented() -> None:
    """Every node label, taint, secret and claim without which a pod would stay Pending or lack a key."""
    for path, pod in pods().items():
        spec = pod["spec"]
        needed = set(spec.get("nodeSelector", {})) | found_in(spec.get("tolerations", []), "key")
        needed |= found_in(spec.get("volumes", []), "claimName")
        for container in spec["containers"]:
            for entry in container.get("env", []):
                secret = entry.get("valueFrom", {}).get("secretKeyRef", {})
                needed |= {secret["name"], secret["key"]} if secret else set()
        for name in needed:
            assert any(name in code for code in CODE), (path, name)
