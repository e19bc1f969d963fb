"""Renders Prometheus' configuration for each kind of cluster, and defines the metrics ports."""

from __future__ import annotations

from typing import Any

METRICS_PORT = 8080
"""Metrics of Ray's agent on every machine (`ray start --metrics-export-port`)."""
AUTOSCALER_PORT, DASHBOARD_PORT = 44217, 44227
"""Metrics of Ray's autoscaler and dashboard, both on the head."""


METRICS_PORTS = {
    "metrics": METRICS_PORT,
    "as-metrics": AUTOSCALER_PORT,
    "dash-metrics": DASHBOARD_PORT,
}
"""Metrics ports of the head pod, by name."""


def prometheus_files(sizes: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Prometheus' configuration by path below cluster/.

    On VMs Prometheus must run inside the network (on AWS in the machines' security group), on
    Kubernetes in `monitoring_namespace`.
    """
    site = sizes["site"]
    return {
        f"monitoring/prometheus-{name}.yaml": [_prometheus(jobs)]
        for name, jobs in {
            "aws": _machines(
                "ec2_sd_configs",
                {
                    "region": site["aws_region"],
                    "filters": [{"name": "tag:ray-cluster-name", "values": ["vlv"]}],
                },
                "__meta_ec2_tag_ray_",
            ),
            "gcp": _machines(
                "gce_sd_configs",
                {
                    "project": site["gcp_project"],
                    "zone": site["gcp_zone"],
                    "filter": "labels.ray-cluster-name=vlv",
                },
                "__meta_gce_label_ray_",
            ),
            "kubernetes": [_pods(site["kubernetes_namespace"])],
        }.items()
    }


def operator_files(sizes: dict[str, Any], dashboard: str) -> dict[str, list[dict[str, Any]]]:
    """The same for kube-prometheus-stack: a PodMonitor, and the dashboard for Grafana's sidecar."""
    site = sizes["site"]
    labels = {"app.kubernetes.io/part-of": "vlv"}
    group = {"sourceLabels": ["__meta_kubernetes_pod_label_ray_io_group"], "targetLabel": "group"}
    cluster = {
        "sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"],
        "targetLabel": "ray_io_cluster",
    }
    monitor = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {
            "name": "vlv",
            "namespace": site["monitoring_namespace"],
            "labels": {
                **labels,
                "release": "prometheus",
            },  # the chart's Prometheus selects by it
        },
        "spec": {
            "namespaceSelector": {"matchNames": [site["kubernetes_namespace"]]},
            "selector": {"matchLabels": labels},
            "podMetricsEndpoints": [
                {"port": port, "relabelings": [group, cluster]} for port in METRICS_PORTS
            ],
        },
    }
    board = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "vlv-dashboard",
            "namespace": site["monitoring_namespace"],
            "labels": {**labels, "grafana_dashboard": "1"},
        },
        "data": {"vlv.json": dashboard},
    }
    return {"monitoring/kubernetes-operator.yaml": [monitor, board]}


def _prometheus(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"global": {"scrape_interval": "15s", "scrape_timeout": "10s"}, "scrape_configs": jobs}


def _machines(discovery: str, query: dict[str, Any], labels: str) -> list[dict[str, Any]]:
    """Scrape jobs for machines tagged by Ray's launcher: all nodes, and the head's two extra ports."""
    head = {"source_labels": [f"{labels}node_type"], "regex": "head", "action": "keep"}
    return [
        {
            "job_name": f"ray-{name}",
            discovery: [{**query, "port": port}],
            "relabel_configs": [
                *([] if name == "nodes" else [head]),
                {"source_labels": [f"{labels}user_node_type"], "target_label": "group"},
            ],
        }
        for name, port in {
            "nodes": METRICS_PORT,
            "autoscaler": AUTOSCALER_PORT,
            "dashboard": DASHBOARD_PORT,
        }.items()
    ]


def _pods(namespace: str) -> dict[str, Any]:
    """The scrape job for our pods: every container port whose name ends in `metrics`."""
    label = "__meta_kubernetes_pod_label_"
    return {
        "job_name": "ray",
        "kubernetes_sd_configs": [{"role": "pod", "namespaces": {"names": [namespace]}}],
        "relabel_configs": [
            {
                "source_labels": [f"{label}app_kubernetes_io_part_of"],
                "regex": "vlv",
                "action": "keep",
            },
            {
                "source_labels": ["__meta_kubernetes_pod_container_port_name"],
                "regex": "(.+-)?metrics",
                "action": "keep",
            },
            # Ray's own dashboards identify a cluster by this label.
            {"source_labels": [f"{label}ray_io_cluster"], "target_label": "ray_io_cluster"},
            {"source_labels": [f"{label}ray_io_group"], "target_label": "group"},
        ],
    }
