"""Versions of the packages that decide what a run computes, as reports show them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("vlv-ray", "ray", "torch", "deepspeed", "transformers", "diffusers", "pyarrow")


def versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES; without those that are not installed as packages."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # ours, in a checkout that was not installed
            continue
    return found
