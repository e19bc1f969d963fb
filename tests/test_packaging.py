"""What is installed: every file of the packages, not only the Python ones."""

from __future__ import annotations

from pathlib import Path

from setuptools.dist import Distribution

ROOT = Path(__file__).parents[1]


def test_every_file_of_the_packages_is_installed(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    distribution.include_package_data = False  # by our patterns alone, not by a manifest of sdist
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    installed = {Path(src, name) for _, src, _, names in build.data_files for name in names}
    files = {
        file.relative_to(ROOT)
        for package in ("vlv_model", "pipelines")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert len(files) > 10
    assert files - installed == set()
