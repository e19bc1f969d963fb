"""What the jobs export is what Prometheus finds: the declared names, kinds and tags."""

import time
import urllib.request

import pytest

from pipelines.execution import telemetry


def test_without_ray_nothing_is_exported_and_nothing_fails() -> None:
    telemetry.INGEST_BYTES.add(7)
    telemetry.INGEST_REQUESTS.set(3)
    telemetry.RECAPTION_BATCH_SECONDS.observe(0.5)


def test_a_wrong_tag_is_refused_with_and_without_ray() -> None:
    with pytest.raises(ValueError, match=r"vlv_rows has the tags \('job', 'status'\)"):
        telemetry.ROWS.add(1, status="ok")


@pytest.mark.parametrize("name", ["rows", "vlv_rows"])
def test_a_name_is_ours_and_declared_once(name: str) -> None:
    with pytest.raises(ValueError, match="expected a new name"):
        telemetry.Gauge(name, "again")


@pytest.mark.end_to_end
def test_prometheus_finds_the_declared_series(ray_local: None) -> None:
    import ray

    @ray.remote
    def worker() -> None:
        telemetry.ROWS.add(5, job="here", status="ok")
        telemetry.INGEST_REQUESTS.set(3)
        telemetry.RECAPTION_BATCH_SECONDS.observe(0.5)

    ray.get(worker.remote())
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    used = (telemetry.ROWS, telemetry.INGEST_REQUESTS, telemetry.RECAPTION_BATCH_SECONDS)
    expected = {series for metric in used for series in metric.series}
    deadline = time.monotonic() + 60
    while True:
        lines = urllib.request.urlopen(address).read().decode().splitlines()
        ours = [line for line in lines if line.startswith("ray_vlv_")]
        # Other tests of this Ray may have exported some of them before.
        is_there = any('job="here"' in line for line in ours)
        is_there = is_there and expected <= {line.partition("{")[0] for line in ours}
        if is_there or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert expected <= {line.partition("{")[0] for line in ours}
    (rows,) = [line for line in ours if 'job="here"' in line]
    assert rows.startswith("ray_vlv_rows_total{")
    assert rows.endswith(" 5.0")
