"""Owners' refusals in a job: one request for a site's rules, in several processes and reruns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.ingest import run as run_job
from pipelines.cli.config import build, dump
from pipelines.images.runs import last_run
from pipelines.ingest import steps
from pipelines.ingest.config import RULES_SETTING, IngestConfig
from pipelines.ingest.job import Ingest, ingest
from pipelines.ingest.report import REPORT
from pipelines.ingest.run_statistics import read_refusals
from pipelines.ingest.web.optout import DEFAULT_RULES
from pipelines.storage.tables import Table, parquet_files
from tests.pipelines.ingest.hosts import ROBOTS, TDM, Hosts, serve_hosts, text

NO = "User-agent: *\nDisallow: /no/"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with serve_hosts(4) as hosts:
        hosts.put(0, ROBOTS, text(NO))
        hosts.put(1, TDM, text(json.dumps([{"location": "/no/", "tdm-reservation": 1}])))
        hosts.put(2, ROBOTS, text("", 503))
        yield hosts


def write_list(folder: Path, hosts: Hosts, rows: int = 5) -> None:
    """For each host `rows` URLs that are allowed and as many below /no/."""
    paths = [f"/{place}{i}.png" for place in ("", "no/") for i in range(rows)]
    urls = [hosts.url(host, path) for host in range(4) for path in paths]
    pq.write_table(pa.table({"URL": urls}), folder / "list.parquet")


def config_of(folder: Path, settings: dict[str, Any] | None = None, **download: Any) -> IngestConfig:  # fmt: skip
    given: dict[str, Any] = {
        "data": {"input": str(folder / "list.parquet"), "output": str(folder / "out")},
        "download": {"allow_private": True, "retries": 0, **download},
        "image": {"size": 16, "format": "png"},
        "duplicates": {"by": "none"},
        "rows_per_chunk": 5,
        "ray": {"address": "in-process"},
    }
    return build(IngestConfig, {**given, **(settings or {})})


def rows_of(folder: Path) -> dict[str, str]:
    """Status and error of each URL."""
    parts = [pq.read_table(file) for file in parquet_files(str(folder / "out"))]
    rows = pa.concat_tables(parts).select(["url", "status", "error"]).to_pylist()
    return {row["url"]: f"{row['status']} {row['error'] or ''}".strip() for row in rows}


@pytest.mark.usefixtures("ray_local")
def test_processes_ask_each_site_once(
    tmp_path: Path, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "CPUS_PER_FETCHER", 1)
    assert steps.fetchers_of([2.0])[0] == 2
    write_list(tmp_path, hosts)
    counts = ingest(config_of(tmp_path, {"ray": {}}))
    assert counts == {"ok": 20, "download:http_5xx": 10, "download:opted_out": 10}
    refused = {0: "robots.txt: Disallow: /no/", 1: "tdmrep.json: /no/"}
    for url, found in rows_of(tmp_path).items():
        host = hosts.names.index(url.split("/")[2].partition(":")[0])
        if host == 2:
            assert found.startswith("download:http_5xx robots.txt: HTTP 503")
        elif host in refused and "/no/" in url:
            assert found == f"download:opted_out {refused[host]}"
        else:
            assert found == "ok"
    assert hosts.requests(ROBOTS) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert hosts.requests(TDM) == {0: 1, 1: 1, 3: 1}
    assert len(hosts.others()) == 20
    table = Table(tmp_path / "out")
    run = last_run(table)
    assert run is not None
    assert read_refusals(run) == [
        {"host": "127.0.1.1", "rule": "robots.txt", "rows": 5},
        {"host": "127.0.1.2", "rule": "tdmrep.json", "rows": 5},
    ]
    page = (table.folder / REPORT).read_text()
    assert "Hosts whose owners refuse most rows" in page
    assert "<code>tdmrep.json</code>" in page
    # A killed job asks again, each site at most once, and only for what is left.
    hosts.log.clear()
    (table.folder / "_commits/000001.json").unlink()
    assert ingest(config_of(tmp_path)) == counts
    assert set(hosts.requests(ROBOTS).values()) == {1}
    assert len(hosts.others()) <= 5


def test_a_table_keeps_its_rules(
    tmp_path: Path, hosts: Hosts, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of an earlier version, too: it recorded `true` for X-Robots-Tag alone."""
    write_list(tmp_path, hosts, 1)
    config = config_of(tmp_path, respect_optout=("x_robots_tag",))
    assert ingest(config) == {"ok": 8}
    run = last_run(Table(tmp_path / "out"))
    assert run is not None
    file = run.folder / "run.json"
    content = json.loads(file.read_text())
    assert content["settings"][RULES_SETTING] == ["x_robots_tag"]
    content["settings"][RULES_SETTING] = True
    file.write_text(json.dumps(content))
    capsys.readouterr()
    assert ingest(config_of(tmp_path)) == {"ok": 8}  # nothing to do, and nothing is said
    assert RULES_SETTING not in capsys.readouterr().err
    write_list(tmp_path, hosts, 2)
    assert ingest(config_of(tmp_path)) == {"ok": 16}
    assert not hosts.requests(ROBOTS)
    said = "download.respect_optout: this table keeps its rules: x_robots_tag; a new table has "
    assert said + ",".join(DEFAULT_RULES) in capsys.readouterr().err
    # Other rules begin with a run, which is said. Stored images stay.
    write_list(tmp_path, hosts, 3)
    other = config_of(tmp_path, respect_optout=("robots_txt", "noml"))
    assert ingest(other) == {"ok": 21, "download:http_5xx": 2, "download:opted_out": 1}
    said = "download.respect_optout: noml,robots_txt from this run on, x_robots_tag before; rows of"
    assert said in capsys.readouterr().err
    again = config_of(tmp_path, respect_optout=("noml", "robots_txt"))
    assert dump(again) != dump(other)
    before = last_run(Table(tmp_path / "out"))
    ingest(again)
    assert last_run(Table(tmp_path / "out")) == before
    # Without rules the refused row is fetched on request.
    retried = config_of(tmp_path, {"retry": ["opted_out", "http_5xx"]}, respect_optout=False)
    assert ingest(retried) == {"ok": 24}


def test_a_killed_run_of_an_earlier_version_continues_under_its_rules(
    tmp_path: Path, hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    write_list(tmp_path, hosts, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Ingest, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            ingest(config_of(tmp_path, respect_optout=("x_robots_tag",)))
    run = last_run(Table(tmp_path / "out"))
    assert run is not None
    file = run.folder / "run.json"
    content = json.loads(file.read_text())
    content["settings"][RULES_SETTING] = True
    file.write_text(json.dumps(content))
    (tmp_path / "out/_commits/000000.json").unlink()
    assert ingest(config_of(tmp_path)) == {"ok": 16}
    assert not hosts.requests(ROBOTS)


def test_a_dry_run_estimates_the_requests(
    tmp_path: Path, hosts: Hosts, capsys: pytest.CaptureFixture[str]
) -> None:
    write_list(tmp_path, hosts)
    run_job(config_of(tmp_path, {"dry_run": True}))
    said = "about 8 more requests for the rules of 4 sites (0.20 for each row), as download.respect_optout "
    assert said + "has robots_txt and tdm_file" in capsys.readouterr().out
    run_job(config_of(tmp_path, {"dry_run": True}, respect_optout="robots_txt"))
    assert "about 4 more requests for the rules of 4 sites" in capsys.readouterr().out
    run_job(config_of(tmp_path, {"dry_run": True}, respect_optout=("x_robots_tag", "noml")))
    assert "more requests" not in capsys.readouterr().out
    assert not hosts.log


@pytest.mark.parametrize(
    ("given", "rules"),
    [(True, DEFAULT_RULES), (False, ()), ([], ()), (["tdm_file", "noml"], ("noml", "tdm_file"))],
)
def test_the_setting_of_earlier_versions_is_understood(
    tmp_path: Path, given: Any, rules: tuple[str, ...]
) -> None:
    config = config_of(tmp_path, respect_optout=given)
    assert config.download.rules == rules
    assert build(IngestConfig, dump(config)) == config
