#!/usr/bin/env python
"""Print a secret from AWS or Google Cloud as shell `export` lines. Runs on the launcher's machines.

    S="$(vlv-secrets aws vlv/keys)" && eval "$S"
    S="$(vlv-secrets gcp projects/my-project/secrets/vlv-keys)" && eval "$S"

The secret is a JSON object of environment variables. The machine's profile needs permission to read
it. Nothing is written to disk. The image has the script as `vlv-secrets` on PATH.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import sys

_GOOGLE = os.environ.get("VLV_SECRET_MANAGER", "https://secretmanager.googleapis.com")


def aws(name: str) -> str:
    """Text of a secret in AWS Secrets Manager, in AWS_DEFAULT_REGION."""
    import boto3

    text: str = boto3.client("secretsmanager").get_secret_value(SecretId=name)["SecretString"]
    return text


def gcp(name: str) -> str:
    """Text of the latest version of a secret in Google Secret Manager, `projects/P/secrets/S`."""
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    credentials, _ = google.auth.default(["https://www.googleapis.com/auth/cloud-platform"])
    answer = AuthorizedSession(credentials).get(f"{_GOOGLE}/v1/{name}/versions/latest:access")
    answer.raise_for_status()
    return base64.b64decode(answer.json()["payload"]["data"]).decode()


def exports(text: str) -> str:
    """`export` lines for a JSON object of variables. Raises ValueError for anything else."""
    content = json.loads(text)
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ValueError('expected a JSON object of strings, as {"WANDB_API_KEY": "…"}')
    if wrong := [name for name in content if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]:
        raise ValueError(f"{wrong[0]!r} is not a valid name of an environment variable")
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in content.items())


def main(arguments: list[str]) -> int:
    stores = {"aws": aws, "gcp": gcp}
    if len(arguments) != 2 or arguments[0] not in stores:
        print("usage: vlv-secrets aws|gcp NAME", file=sys.stderr)
        return 2
    cloud, name = arguments
    try:
        print(exports(stores[cloud](name)))
    # boto3 and google.auth raise many types. The message must not contain the secret.
    except Exception as error:
        reason = "it is not JSON" if isinstance(error, json.JSONDecodeError) else error
        print(f"error: secret {name} of {cloud} cannot be read: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
