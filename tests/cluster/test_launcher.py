"""`ray up` on moto's fake AWS: it starts a head, whose autoscaler then starts machines.

Machines are folders on this machine: `ssh`, `docker`, `rsync`, `sudo` and `chown` on PATH are the script
below, which runs the launcher's commands in the folder of the machine they are sent to. The head's Ray is real.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

import psutil
import pytest
import yaml

from cluster.render import read_sizes, rendered
from tests.ray_head import BIN, START, free_ports

pytestmark = [pytest.mark.end_to_end, pytest.mark.faults]

T = TypeVar("T")

REGION = "us-east-1"
FULL = (
    "<Response><Errors><Error><Code>MaxSpotInstanceCountExceeded</Code><Message>Max spot instance"
    " count exceeded</Message></Error></Errors><RequestID>1</RequestID></Response>"
)
MACHINE = r"""#!/bin/bash
# One script for six commands, of which two do nothing; $MACHINES has a folder for each address.
echo "$(basename "$0") $*" >> "$MACHINES/log"
case "$(basename "$0")" in
ssh)
    while [[ "$1" != ubuntu@* ]]; do shift; done
    export HOST="$MACHINES/${1#ubuntu@}"; shift
    export HOME="$HOST/home"
    mkdir -p "$HOME"
    echo "export PATH=$FAKES:$PATH" > "$HOME/.bashrc"
    command="$*"
    exec setsid bash -c "${command//\/tmp\/ray_tmp_mount/$HOST/mount}" < /dev/null ;;
rsync)
    from="${@: -2:1}" to="${@: -1}"
    if [[ "$to" == ubuntu@* ]]; then
        address="${to%%:*}"
        to="${to#*:}"; to="${to//\/tmp\/ray_tmp_mount/$MACHINES/${address#ubuntu@}/mount}"
    else
        to="${to#*:}"
    fi
    mkdir -p "$(dirname "$to")" && cp -r "$from" "$to" ;;
docker)
    case "$1" in
    inspect) case "$3" in
        *Running*) if [ -e "$HOST/container" ]; then echo true; else echo false; fi ;;
        *) echo '[]' ;;
        esac ;;
    run)
        for word in "$@"; do
            if [[ "$last" == --env ]]; then echo "export $word" >> "$HOST/container"; fi
            if [[ "$last" == -v && "$word" == *:"$MACHINES"/* ]]; then
                mkdir -p "$(dirname "${word#*:}")" && cp "${word%%:*}" "${word#*:}"
            fi
            last="$word"
        done ;;
    exec)
        shift; while [[ "$1" != vlv ]]; do shift; done; shift
        source "$HOST/container"
        export RAY_AUTH_TOKEN_PATH="$TOKEN"
        exec "$@" ;;
    esac ;;
ray)
    if [ "$1" = start ] && [ "$2" = --head ]; then
        shift 2
        for word in "$@"; do case "$word" in --*port=*) ;; *) options+=("$word") ;; esac; done
        WORKERS_PYTHON="$PYTHON" exec "$PYTHON" -c "$START" start --head $HEAD_OPTIONS "${options[@]}"
    fi ;;
esac
"""


@dataclass
class Cloud:
    """A fake AWS region, and the machine that runs `ray up`."""

    client: Any
    environment: dict[str, str]
    folder: Path
    full: list[str]  # subnets whose zones have no spot machine

    def machines(self) -> list[dict[str, Any]]:
        found = self.client.describe_instances()["Reservations"]
        return [machine for one in found for machine in one["Instances"]]

    def typed(self) -> str:
        """The commands that were run on any machine."""
        return (self.folder / "machines/log").read_text()

    def log(self) -> str:
        """Output of `ray up` and of the autoscaler."""
        logs = self.folder.glob("ray/session_latest/logs/monitor*")
        return "\n".join([self.typed()[-4000:], *(file.read_text()[-4000:] for file in logs)])

    def until(self, found: Callable[[], T | None], seconds: float = 120) -> T:
        """Wait until something is found and return it."""
        deadline = time.monotonic() + seconds
        while (it := found()) is None:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.5)
        return it


def without_spot(app: Any, full: list[str]) -> Any:
    """moto's server, without spot machines in subnets of full zones."""

    def answer(environ: dict[str, Any], start: Any) -> Any:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        asked = parse_qs(body.decode(errors="replace"))
        spot = asked.get("InstanceMarketOptions.MarketType") == ["spot"]
        if spot and asked.get("SubnetId", [""])[0] in full:
            start("500 Internal Server Error", [("Content-Type", "text/xml")])
            return [FULL.encode()]
        return app(environ, start)

    return answer


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    boto3 = pytest.importorskip("boto3")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    full: list[str] = []
    app = without_spot(DomainDispatcherApplication(create_backend_app), full)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = Path(tempfile.mkdtemp(prefix="vlv"))  # sockets need a short path
    fakes, machines, home = (folder / name for name in ("bin", "machines", "home"))
    for path in (fakes, machines, home / ".ray"):
        path.mkdir(parents=True)
    (home / ".ray/auth_token").write_text("a" * 64)
    for name in ("ssh", "docker", "rsync", "sudo", "chown", "ray"):
        (fakes / name).write_text(MACHINE)
        (fakes / name).chmod(0o755)
    ports = dict(
        zip(
            ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port"),
            free_ports(4),
            strict=True,
        )
    )
    options = [f"--{name}={port}" for name, port in ports.items()]
    options += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder / 'ray'}"]
    options += [f"--object-store-memory={200 * 2**20}"]
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": REGION,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "HOME": str(home),
        "PATH": f"{fakes}:{BIN}:{os.environ['PATH']}",
        "FAKES": str(fakes),
        "MACHINES": str(machines),
        "TOKEN": str(machines / "container/.ray/auth_token"),
        "PYTHON": sys.executable,
        "START": START,
        "HEAD_OPTIONS": " ".join(options),
        "GCS": f"127.0.0.1:{ports['port']}",
    }
    names = ("endpoint_url", "aws_access_key_id", "aws_secret_access_key", "region_name")
    values = (environment["AWS_ENDPOINT_URL"], "a", "b", REGION)
    client = boto3.client("ec2", **dict(zip(names, values, strict=True)))
    roles = boto3.client("iam", **dict(zip(names, values, strict=True)))
    for profile in ("vlv-head", "vlv-worker"):
        roles.create_instance_profile(InstanceProfileName=profile)
    yield Cloud(client, environment, folder, full)
    for one in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in one.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                one.kill()
    server.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def launcher(cloud: Cloud) -> Path:
    """The launcher's file for AWS, with this region's resources."""
    sizes = copy.deepcopy(read_sizes())
    subnets = cloud.client.describe_subnets()["Subnets"][:2]
    group = cloud.client.create_security_group(
        GroupName="vlv", Description="vlv", VpcId=subnets[0]["VpcId"]
    )
    sizes["site"] |= {
        "aws_image_id": cloud.client.describe_images()["Images"][0]["ImageId"],
        "aws_private_subnets": [subnet["SubnetId"] for subnet in subnets],
        "aws_security_group": group["GroupId"],
    }
    cloud.full.append(subnets[0]["SubnetId"])
    path = cloud.folder / "aws.yaml"
    # All containers see the disk of this machine, where nothing is below the image's home.
    token = "/home/ray/.ray/auth_token"
    text = rendered(sizes)["launcher/aws.yaml"]
    assert token in text
    path.write_text(text.replace(token, cloud.environment["TOKEN"]))
    return path


ASK = """
import os, ray
ray.init(os.environ["GCS"], log_to_driver=False)
from ray.autoscaler.sdk import request_resources
request_resources(bundles=[{"gpu_spot": 1}])
"""


def test_the_launcher_starts_a_head_whose_autoscaler_starts_machines(cloud: Cloud) -> None:
    file = launcher(cloud)
    up = [str(BIN / "ray"), "up", "--yes", "--no-config-cache", str(file)]
    done = subprocess.run(
        up, env=cloud.environment, capture_output=True, text=True, timeout=300, cwd=cloud.folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (head,) = cloud.machines()
    wanted = yaml.safe_load(file.read_text())["available_node_types"]
    assert head["InstanceType"] == wanted["head"]["node_config"]["InstanceType"]
    assert head["IamInstanceProfile"]["Arn"].endswith("/vlv-head")

    environment = {**cloud.environment, "RAY_AUTH_MODE": "token"}
    environment["RAY_AUTH_TOKEN_PATH"] = f"{cloud.environment['HOME']}/.ray/auth_token"
    ask = [sys.executable, "-c", ASK]
    done = subprocess.run(ask, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

    def worker() -> dict[str, Any] | None:
        kinds = {machine["InstanceType"]: machine for machine in cloud.machines()}
        return kinds.get(wanted["gpu_spot"]["node_config"]["InstanceType"])

    machine = cloud.until(worker)
    tags = {tag["Key"]: tag["Value"] for tag in machine["Tags"]}
    assert tags["ray-user-node-type"] == "gpu_spot"
    assert tags["project"] == "vlv"
    assert machine["InstanceLifecycle"] == "spot"
    assert machine["SubnetId"] not in cloud.full  # but the other zone's
    assert machine["IamInstanceProfile"]["Arn"].endswith("/vlv-worker")
    groups = [group["GroupId"] for group in machine["SecurityGroups"]]
    assert groups == wanted["gpu_spot"]["node_config"]["SecurityGroupIds"]
    # And the head types at it what makes it a worker.
    cloud.until(lambda: re.search(r"^ray start --address=", cloud.typed(), re.MULTILINE))
    assert re.search(r"^docker run .*--volume /shared:/shared", cloud.typed(), re.MULTILINE)
    assert re.search(r"^sudo mount -t nfs .* /shared$", cloud.typed(), re.MULTILINE)
