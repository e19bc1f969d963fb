"""Renders cluster/sizes.yaml into what the launcher and Kubernetes read; the results are committed.

python cluster/render.py            # write the files
python cluster/render.py --check    # status 1 where a committed file is stale
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

from cluster.allocatable import misfits  # noqa: E402
from cluster.dashboard import dashboard  # noqa: E402
from cluster.disks import disk_files  # noqa: E402
from cluster.kubernetes import kubernetes_files  # noqa: E402
from cluster.monitoring import operator_files, prometheus_files  # noqa: E402
from cluster.pools import pool_files, pool_texts  # noqa: E402
from cluster.rights import right_texts  # noqa: E402
from cluster.vms import launcher_files  # noqa: E402

HEADER = "# Rendered by cluster/render.py from cluster/sizes.yaml: change that, not this.\n"


def read_sizes() -> dict[str, Any]:
    """Content of sizes.yaml."""
    sizes: dict[str, Any] = yaml.safe_load((HERE / "sizes.yaml").read_text(encoding="utf-8"))
    return sizes


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # what is shared here is written out there


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Scripts and files within files stay readable."""
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
    return {**texts, **pool_texts(sizes), **right_texts(sizes), "monitoring/grafana.json": board}


def stale(sizes: dict[str, Any]) -> list[str]:
    """Paths of committed files that differ from what the sizes give."""
    return list(_differing(sizes))


def _differing(sizes: dict[str, Any]) -> dict[str, str]:
    """What the stale files should be, by path below cluster/."""
    return {
        path: text
        for path, text in rendered(sizes).items()
        if not (HERE / path).is_file() or (HERE / path).read_text(encoding="utf-8") != text
    }


def main() -> int:
    sizes = read_sizes()
    if lines := misfits(sizes):
        print("\n".join(f"error: cluster/sizes.yaml: {line}" for line in lines), file=sys.stderr)
        return 1
    differing = _differing(sizes)
    if "--check" in sys.argv[1:]:
        for path in differing:
            print(f"error: cluster/{path} is stale: run python cluster/render.py", file=sys.stderr)
        return bool(differing)
    for path, text in differing.items():
        (HERE / path).parent.mkdir(parents=True, exist_ok=True)
        (HERE / path).write_text(text, encoding="utf-8")
        print(f"cluster/{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
