"""Dashboard and scrape configuration: every query parses and uses exported metrics."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from cluster.monitoring import AUTOSCALER_PORT, METRICS_PORT
from cluster.render import read_sizes, rendered
from pipelines.execution.telemetry import METRICS

promql = pytest.importorskip("promql_parser", reason="pip install -e '.[dev]'")

FILES = rendered(read_sizes())
PANELS = json.loads(FILES["monitoring/grafana.json"])["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
RANGE = "5m"  # what Grafana puts in for $__rate_interval


def selected(query: str) -> set[str]:
    """Names of the metrics in a query; ValueError if it is not PromQL."""
    text = query.replace("$__rate_interval", RANGE)
    tree = promql.parse(text)
    names = set(re.findall(r"\b(?:ray|autoscaler)_[a-z0-9_]+(?=\{)", text))
    assert names, tree
    return names


def ray_series() -> set[str]:
    """The names that Ray's own dashboards read, from the installed Ray."""
    folder = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards"
    text = "".join(file.read_text() for file in folder.glob("*_panels.py"))
    return set(re.findall(r"\b((?:ray|autoscaler)_[a-z0-9_]+)\b", text))


def test_every_query_uses_exported_metrics() -> None:
    ours = {series for metric in METRICS.values() for series in metric.series}
    read = set().union(*map(selected, QUERIES))
    assert {name for name in read if name.startswith("ray_vlv_")} <= ours
    assert {name for name in read if not name.startswith("ray_vlv_")} <= ray_series()


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    read = set().union(*map(selected, QUERIES))
    assert [m.name for m in METRICS.values() if not read & set(m.series)] == []


def test_tags_in_queries_are_those_of_the_metrics() -> None:
    by_series = {series: m for m in METRICS.values() for series in m.series}
    rays = {"SessionName", "instance", "le"}
    for query in QUERIES:
        for name, filters in re.findall(r"(ray_vlv_[a-z_]+)\{([^}]*)\}", query):
            tags = set(re.findall(r"(\w+)\s*[=!]", filters))
            tags |= {t for by in re.findall(r"by \(([^)]*)\)", query) for t in by.split(", ")}
            assert tags <= rays | set(by_series[name].tags), query


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for at in (panel["gridPos"] for panel in PANELS):
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"])
               for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert at["x"] + at["w"] <= 24
        assert not own & cells
        cells |= own


def test_prometheus_scrapes_rays_ports() -> None:
    from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT

    assert AUTOSCALER_PORT == AUTOSCALER_METRIC_PORT
    for cloud in ("aws", "gcp"):
        (config,) = yaml.safe_load_all(FILES[f"monitoring/prometheus-{cloud}.yaml"])
        discovered: list[dict[str, Any]] = config["scrape_configs"]
        ports = [
            job[f"{'ec2' if cloud == 'aws' else 'gce'}_sd_configs"][0]["port"] for job in discovered
        ]
        assert ports[0] == METRICS_PORT
        assert f"--metrics-export-port={METRICS_PORT}" in FILES[f"launcher/{cloud}.yaml"]
    (cluster,) = yaml.safe_load_all(FILES["kuberay/raycluster.yaml"])
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        assert group["rayStartParams"]["metrics-export-port"] == str(METRICS_PORT)
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "metrics", "containerPort": METRICS_PORT} in container["ports"]
