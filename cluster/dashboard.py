"""Renders Grafana's dashboard from one table of panels.

Queries use metrics of pipelines/execution/telemetry.py and of Ray; a test checks that they exist.
"""

from __future__ import annotations

from typing import Any

_ALL = 'SessionName=~"$session"'
_RUN = 'stage=~"$stage", run=~"$run"'

# (row, [(title, unit, [(query, legend)])]). Units are Grafana's.
_ROWS: list[tuple[str, list[tuple[str, str, list[tuple[str, str]]]]]] = [
    (
        "Jobs",
        [
            (
                "Rows by job",
                "rowsps",
                [
                    (
                        f"sum by (job) (rate(ray_vlv_rows_total{{{_ALL}}}[$__rate_interval]))",
                        "{{job}}",
                    )
                ],
            ),
            (
                "Rows that are not ok, by status",
                "rowsps",
                [
                    (
                        "topk(10, sum by (job, status) "
                        f'(rate(ray_vlv_rows_total{{{_ALL}, status!="ok"}}[$__rate_interval])))',
                        "{{job}} {{status}}",
                    )
                ],
            ),
            (
                "Fraction of rows that are ok, last 15 minutes",
                "percentunit",
                [
                    (
                        f'sum by (job) (increase(ray_vlv_rows_total{{{_ALL}, status="ok"}}[15m])) '
                        f"/ sum by (job) (increase(ray_vlv_rows_total{{{_ALL}}}[15m]))",
                        "{{job}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Ingest",
        [
            (
                "Bytes downloaded",
                "Bps",
                [(f"sum(rate(ray_vlv_ingest_bytes_total{{{_ALL}}}[$__rate_interval]))", "bytes")],
            ),
            (
                "Requests in flight",
                "short",
                [(f"sum by (instance) (ray_vlv_ingest_requests{{{_ALL}}})", "{{instance}}")],
            ),
            (
                "Network of the machines",
                "Bps",
                [
                    (f"sum(ray_node_network_receive_speed{{{_ALL}}})", "in"),
                    (f"sum(ray_node_network_send_speed{{{_ALL}}})", "out"),
                ],
            ),
        ],
    ),
    (
        "Training",
        [
            (
                "Loss",
                "short",
                [
                    (f"max by (stage, run) (ray_vlv_train_loss{{{_RUN}}})", "{{stage}} {{run}}"),
                    (
                        f"max by (stage, run) (ray_vlv_train_heldout_loss{{{_RUN}}})",
                        "{{stage}} {{run}} held out",
                    ),
                ],
            ),
            (
                "Images per second",
                "short",
                [
                    (
                        f"max by (stage, run) (ray_vlv_train_images_per_second{{{_RUN}}})",
                        "{{stage}} {{run}}",
                    )
                ],
            ),
            (
                "Fraction of step time spent waiting for data",
                "percentunit",
                [
                    (
                        f"max by (stage, run) (ray_vlv_train_data_share{{{_RUN}}})",
                        "{{stage}} {{run}}",
                    )
                ],
            ),
            (
                "Gradient norm",
                "short",
                [
                    (
                        f"max by (stage, run) (ray_vlv_train_grad_norm{{{_RUN}}})",
                        "{{stage}} {{run}}",
                    )
                ],
            ),
            (
                "Step",
                "short",
                [(f"max by (stage, run) (ray_vlv_train_step{{{_RUN}}})", "{{stage}} {{run}}")],
            ),
        ],
    ),
    (
        "Recaption",
        [
            (
                "Images captioned",
                "short",
                [
                    (
                        f"sum(rate(ray_vlv_recaption_images_total{{{_ALL}}}[$__rate_interval]))",
                        "per second",
                    )
                ],
            ),
            (
                "Tokens generated",
                "short",
                [
                    (
                        f"sum(rate(ray_vlv_recaption_tokens_total{{{_ALL}}}[$__rate_interval]))",
                        "per second",
                    )
                ],
            ),
            (
                "Seconds per batch",
                "s",
                [
                    (
                        f"histogram_quantile({share}, sum by (le) (rate("
                        f"ray_vlv_recaption_batch_seconds_bucket{{{_ALL}}}[$__rate_interval])))",
                        name,
                    )
                    for share, name in ((0.5, "median"), (0.95, "95th percentile"))
                ],
            ),
            (
                "Actor utilisation",
                "percentunit",
                [
                    (
                        f"sum by (job) (rate(ray_vlv_actor_busy_seconds_total{{{_ALL}}}"
                        f"[$__rate_interval])) / sum by (job) (rate(ray_vlv_actor_seconds_total"
                        f"{{{_ALL}}}[$__rate_interval]))",
                        "{{job}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Machines",
        [
            (
                "Nodes by group",
                "short",
                [(f"sum by (NodeType) (autoscaler_active_nodes{{{_ALL}}})", "{{NodeType}}")],
            ),
            (
                "GPU utilisation",
                "percent",
                [
                    (
                        f"avg by (instance, GpuIndex) (ray_node_gpus_utilization{{{_ALL}}})",
                        "{{instance}} {{GpuIndex}}",
                    )
                ],
            ),
            (
                "GPU memory in use",
                "decmbytes",
                [
                    (
                        f"sum by (instance, GpuIndex) (ray_node_gram_used{{{_ALL}}})",
                        "{{instance}} {{GpuIndex}}",
                    )
                ],
            ),
            (
                "CPU utilisation",
                "percent",
                [(f"avg by (instance) (ray_node_cpu_utilization{{{_ALL}}})", "{{instance}}")],
            ),
            (
                "Memory in use",
                "percentunit",
                [
                    (
                        f"sum by (instance) (ray_node_mem_used{{{_ALL}}}) "
                        f"/ sum by (instance) (ray_node_mem_total{{{_ALL}}})",
                        "{{instance}}",
                    )
                ],
            ),
            (
                "Free disk space",
                "bytes",
                [(f"min by (instance) (ray_node_disk_free{{{_ALL}}})", "{{instance}}")],
            ),
            (
                "Object store by location",
                "bytes",
                [(f"sum by (Location) (ray_object_store_memory{{{_ALL}}})", "{{Location}}")],
            ),
            (
                "Tasks by state",
                "short",
                [(f"sum by (State) (ray_tasks{{{_ALL}}})", "{{State}}")],
            ),
            (
                "Workers lost per minute: out of memory, other",
                "short",
                [
                    (
                        f"60 * sum(rate(ray_memory_manager_worker_eviction_total{{{_ALL}}}[5m]))",
                        "memory",
                    ),
                    (
                        "60 * sum(rate(ray_node_manager_unexpected_worker_failure_total"
                        f"{{{_ALL}}}[5m]))",
                        "other",
                    ),
                ],
            ),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON for Grafana's import; its variable `source` selects the Prometheus."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in _ROWS:
        panels.append({"type": "row", "title": title, "gridPos": _at(0, y, 24, 1), "panels": []})
        y += 1
        for number, (name, unit, queries) in enumerate(row):
            x, below = 8 * (number % 3), 8 * (number // 3)
            panels.append(_panel(name, unit, queries, _at(x, y + below, 8, 8)))
        y += 8 * -(-len(row) // 3)
    for number, panel in enumerate(panels):
        panel["id"] = number + 1
    return {
        "uid": "vlv",
        "title": "VLV on Ray",
        "tags": ["ray", "vlv"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "source",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                },
                _variable("session", "label_values(ray_node_cpu_count, SessionName)"),
                _variable("stage", "label_values(ray_vlv_train_step, stage)"),
                _variable("run", "label_values(ray_vlv_train_step, run)"),
            ]
        },
        "panels": panels,
    }


_SOURCE = {"type": "prometheus", "uid": "${source}"}


def _at(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _panel(
    title: str, unit: str, queries: list[tuple[str, str]], position: dict[str, int]
) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"fillOpacity": 10}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _SOURCE,
                "expr": expr,
                "legendFormat": legend,
            }
            for i, (expr, legend) in enumerate(queries)
        ],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }
