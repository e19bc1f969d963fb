#!/usr/bin/env python
"""Prints a secret of the cloud's store as a shell takes it, for the machines that Ray's launcher starts.

    S="$(vlv-secrets aws vlv/keys)" && eval "$S"
    S="$(vlv-secrets gcp projects/my-project/secrets/vlv-keys)" && eval "$S"

The secret is a JSON object of environment variables. The machine's own profile has to be allowed to
read it; nothing is written anywhere. In the image it is `vlv-secrets` on PATH.
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
    """Text of a secret of AWS Secrets Manager, in the region of the environment."""
    import boto3

    text: str = boto3.client("secretsmanager").get_secret_value(SecretId=name)["SecretString"]
    return text


def gcp(name: str) -> str:
    """Text of the newest version of a secret of Google Secret Manager, `projects/P/secrets/S`."""
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    credentials, _ = google.auth.default(["https://www.googleapis.com/auth/cloud-platform"])
    answer = AuthorizedSession(credentials).get(f"{_GOOGLE}/v1/{name}/versions/latest:access")
    answer.raise_for_status()
    return base64.b64decode(answer.json()["payload"]["data"]).decode()


def exports(text: str) -> str:
    """Lines that set the variables of a JSON object. Raises ValueError where it is none."""
    content = json.loads(text)
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ValueError('expected a JSON object of texts, as {"WANDB_API_KEY": "…"}')
    if wrong := [name for name in content if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]:
        raise ValueError(f"{wrong[0]!r} is no name of an environment variable")
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in content.items())


def main(arguments: list[str]) -> int:
    stores = {"aws": aws, "gcp": gcp}
    if len(arguments) != 2 or arguments[0] not in stores:
        print("usage: vlv-secrets aws|gcp NAME", file=sys.stderr)
        return 2
    cloud, name = arguments
    try:
        print(exports(stores[cloud](name)))
    except Exception as error:  # of either library, of every type; never with the secret's text
        reason = "it is not JSON" if isinstance(error, json.JSONDecodeError) else error
        print(f"error: secret {name} of {cloud} cannot be read: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
