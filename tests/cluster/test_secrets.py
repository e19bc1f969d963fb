"""Secrets reach the process from a cloud's secret store: moto's for AWS, our own fake for Google."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.render import HERE, read_sizes
from cluster.vlv_secrets import exports
from cluster.vms import launcher_files

KEYS = {"WANDB_API_KEY": 'it\'s $HOME; `no` "command"', "HF_TOKEN": "hf_äö 1"}


@pytest.fixture
def aws_store() -> Iterator[dict[str, str]]:
    """The environment of a machine in a region with a secret."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    place = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a",
             "AWS_SECRET_ACCESS_KEY": "b"}  # fmt: skip
    client = boto3.client("secretsmanager", region_name="us-east-1", endpoint_url=place["AWS_ENDPOINT_URL"],
                          aws_access_key_id="a", aws_secret_access_key="b")  # fmt: skip
    client.create_secret(Name="vlv/keys", SecretString=json.dumps(KEYS))
    yield place
    server.stop()


@pytest.fixture
def google_store(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A fake Secret Manager that accepts the token from the machine's metadata server."""

    class Google(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, body = self.path.partition("?")[0], {}
            if path.endswith("/token"):
                body = {"access_token": "t", "expires_in": 3000, "token_type": "Bearer"}
            elif path.endswith("/service-accounts/default/"):
                body = {"email": "worker@p", "scopes": [], "aliases": []}
            elif path.endswith("/project/project-id"):
                return self.answer(b"p")
            elif path == "/v1/projects/p/secrets/keys/versions/latest:access":
                if self.headers["Authorization"] != "Bearer t":
                    return self.send_error(401)
                data = base64.b64encode(json.dumps(KEYS).encode()).decode()
                body = {"payload": {"data": data}}
            elif path.startswith("/v1/"):
                return self.send_error(404)
            self.answer(json.dumps(body).encode())

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Google) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        yield {
            "VLV_SECRET_MANAGER": f"http://{host}",
            "GCE_METADATA_HOST": host,
            "GCE_METADATA_IP": host,
            "GOOGLE_APPLICATION_CREDENTIALS": "",
            "CLOUDSDK_CONFIG": str(tmp_path),
        }
        server.shutdown()


def started(cloud: str, secret: str, folder: Path, place: dict[str, str]) -> dict[str, str]:
    """The environment of `ray start` in the container, from the launcher's command."""
    sizes = read_sizes()
    sizes["site"][f"{cloud}_secret"] = secret
    (launcher,) = launcher_files(sizes)[f"launcher/{cloud}.yaml"]
    _, command = launcher["worker_start_ray_commands"]
    for name, text in {
        "ray": f"#!{sys.executable}\nimport json, os\nprint(json.dumps(dict(os.environ)))\n",
        "vlv-secrets": f'#!/bin/bash\nexec {sys.executable} {HERE}/vlv_secrets.py "$@"\n',
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "GOOGLE_"))}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "RAY_HEAD_IP": "127.0.0.1", **place}
    ended = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120
    )
    if ended.returncode:
        return {"error": ended.stderr}
    found: dict[str, str] = json.loads(ended.stdout)
    return found


def test_keys_of_aws_reach_the_process(aws_store: dict[str, str], tmp_path: Path) -> None:
    assert started("aws", "vlv/keys", tmp_path, aws_store).items() >= KEYS.items()
    failed = started("aws", "vlv/others", tmp_path, aws_store)["error"]
    assert "error: secret vlv/others of aws cannot be read: " in failed.splitlines()[-1]


def test_keys_of_google_reach_the_process(google_store: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("google.auth")
    name = "projects/p/secrets/keys"
    assert started("gcp", name, tmp_path, google_store).items() >= KEYS.items()
    failed = started("gcp", "projects/p/secrets/no", tmp_path, google_store)["error"]
    assert "error: secret projects/p/secrets/no of gcp cannot be read: " in failed.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('["a"]', "expected a JSON object of strings"),
        ('{"A": 1}', "expected a JSON object of strings"),
        ('{"A B": "x"}', "'A B' is not a valid name"),
        ('{"A;rm": "x"}', "'A;rm' is not a valid name"),
    ],
)
def test_a_secret_that_is_not_a_set_of_variables_is_rejected(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        exports(text)
