"""Faults for benchmarks/faults/chaos.py: killed processes, a full disk, a broken connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).parents[2]

KILLS = ("driver", "group", "worker", "rank", "reader", "decoder", "head")
"""Targets of SIGKILL: the driver; the driver with all its descendants; a Ray worker or actor; a
training rank; an actor that reads for a rank; an image decoder's child process; Ray's raylet, one of its
agents, or the GCS."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
ENDS_JOB = ("driver", "group", "head")  # these end the job, which must be started again


class Attempt:
    """One run of a job's command, with all processes that it started."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        self.began = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                command, cwd=REPO, stdout=output, stderr=output, env={**os.environ, **environment},
                start_new_session=True,
            )  # fmt: skip
        self.seen: set[psutil.Process] = set()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        """What this attempt has printed so far."""
        with open(self.log, "rb") as file:
            file.seek(self.began)
            return file.read().decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """The driver and all its current descendants."""
        try:
            root = psutil.Process(self.process.pid)
            found = [root, *root.children(recursive=True)]
        except psutil.Error:
            return []
        self.seen.update(found)
        return found

    def kill(self, target: str, rng: random.Random) -> bool:
        """SIGKILL one of KILLS; False if no such process exists at the moment."""
        processes = self.processes()
        matchers: dict[str, Callable[[str], bool]] = {
            "worker": lambda line: line.startswith("ray::") and not line.startswith(AGENTS),
            "rank": lambda line: line.startswith("ray::") and "RayTrainWorker" in line,
            "reader": lambda line: line.startswith("ray::_Reader"),
            "decoder": lambda line: "pipelines.ingest.decoder" in line,
            "head": lambda line: (
                "raylet/raylet " in line or "gcs/gcs_server " in line or line.startswith(AGENTS)
            ),
        }
        if target in matchers:
            found = [one for one in processes if matchers[target](_command_line(one))]
            victims = [rng.choice(found)] if found else []
        else:
            victims = processes if target == "group" else processes[:1]
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        return bool(victims)

    def wait(self, seconds: float) -> bool:
        """Wait for the end; False if it still runs after `seconds`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill_all(self) -> None:
        """Kill all remaining processes of this attempt."""
        self.processes()
        for one in self.seen:
            with contextlib.suppress(psutil.Error):
                if one.is_running():
                    one.kill()
        self.process.wait()


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) + " "
    except psutil.Error:
        return ""


# --------------------------------------------------------------------------------- a full disk


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a file system in memory at `folder`; needs permission to mount (`enter_namespace`)."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "chaos", folder], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def enter_namespace() -> None:
    """Restart this program as root of its own user namespace, where it may mount."""
    if os.environ.get("CHAOS_NAMESPACE"):
        return
    os.environ["CHAOS_NAMESPACE"] = "1"
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        raise SystemExit("the disk fault needs user namespaces (unshare --user --mount) to mount")
    os.execvp("unshare", [*command, sys.executable, *sys.argv])


def fill_disk(folder: Path) -> Path:
    """Fill a file system completely; returns the file that fills it."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    return ballast


# ----------------------------------------------------------------------------- a failing store


class FlakyProxy:
    """A TCP proxy that forwards its port to port `target` and can fail.

    `state`: passes; refuses (closes new and open connections); hangs (connections stay open and
    silent).
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.state = "passes"
        self.writers: set[asyncio.StreamWriter] = set()
        self.port: int = run_in_thread(self._open)

    async def _open(self) -> int:
        self.loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    def turn(self, state: str) -> None:
        self.state = state
        if state != "hangs":  # connections that hung are closed, as when a server restarts
            self.loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            if self.state == "refuses":
                return
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(
                self._copy(reader, server_writer), self._copy(server_reader, writer)
            )
        except OSError:
            pass
        finally:
            self.writers.discard(writer)
            writer.transport.abort()

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                while self.state == "hangs":
                    await asyncio.sleep(0.1)
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()


# ------------------------------------------------------------------------------------- threads


def run_in_thread(start: Callable[[], Any]) -> Any:
    """Run a coroutine in a new event loop in a thread, which keeps running; returns its result."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return asyncio.run_coroutine_threadsafe(start(), loop).result()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds; False if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.03)
    return True
