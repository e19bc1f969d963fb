"""Renders cluster/sizes.yaml into files for the cluster launcher and Kubernetes, which are committed.

python cluster/render.py            # write the files
python cluster/render.py --check    # exit status 1 if a committed file is stale
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(HERE.parent))

from cluster.allocatable import oversized_pods  # noqa: E402
from cluster.dashboard import dashboard  # noqa: E402
from cluster.disks import disk_files  # noqa: E402
from cluster.kubernetes import kubernetes_files  # noqa: E402
from cluster.monitoring import operator_files, prometheus_files  # noqa: E402
from cluster.permissions import permission_files  # noqa: E402
from cluster.pools import pool_files, pool_texts  # noqa: E402
from cluster.vms import launcher_files  # noqa: E402

HEADER = "# Rendered by cluster/render.py from cluster/sizes.yaml: edit that file, not this one.\n"


def read_sizes() -> dict[str, Any]:
    """Content of sizes.yaml."""
    sizes: dict[str, Any] = yaml.safe_load((HERE / "sizes.yaml").read_text(encoding="utf-8"))
    return sizes


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # write objects that are used twice in full


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Write multi-line strings, such as scripts, as literal blocks."""
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _text)


def rendered(sizes: dict[str, Any]) -> dict[str, str]:
    """Text of every rendered file by its path below cluster/."""
    files = launcher_files(sizes) | kubernetes_files(sizes) | pool_files(sizes) | disk_files(sizes)
    board = json.dumps(dashboard(), indent=1) + "\n"
    files |= prometheus_files(sizes) | operator_files(sizes, board)
    texts = {
        path: HEADER
        + "---\n".join(
            yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100)
            for document in documents
        )
        for path, documents in files.items()
    }
    return {
        **texts,
        **pool_texts(sizes),
        **permission_files(sizes),
        "monitoring/grafana.json": board,
    }


def stale(sizes: dict[str, Any]) -> list[str]:
    """Paths of committed files that differ from the rendered ones."""
    return list(_stale_files(sizes))


def _stale_files(sizes: dict[str, Any]) -> dict[str, str]:
    """The new text of stale files, by path below cluster/."""
    return {
        path: text
        for path, text in rendered(sizes).items()
        if not (HERE / path).is_file() or (HERE / path).read_text(encoding="utf-8") != text
    }


def main() -> int:
    sizes = read_sizes()
    if lines := oversized_pods(sizes):
        print("\n".join(f"error: cluster/sizes.yaml: {line}" for line in lines), file=sys.stderr)
        return 1
    files = _stale_files(sizes)
    if "--check" in sys.argv[1:]:
        for path in files:
            print(f"error: cluster/{path} is stale: run python cluster/render.py", file=sys.stderr)
        return bool(files)
    for path, text in files.items():
        (HERE / path).parent.mkdir(parents=True, exist_ok=True)
        (HERE / path).write_text(text, encoding="utf-8")
        print(f"cluster/{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
