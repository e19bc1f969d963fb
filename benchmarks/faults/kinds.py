"""Faults of the real world, for benchmarks/faults/chaos.py: processes, disks, stores and machines that go."""

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
"""Whom SIGKILL hits: the driver; it and all that it started; one of Ray's workers or actors; one of a
training's ranks, or of the actors that read for them; a decoder's child process; Ray's raylet, an agent
without which it ends, or GCS."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
ENDING = ("driver", "group", "head")  # after these the job is gone and has to be started again


class Attempt:
    """One run of a job's command, with all the processes that it started."""

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
    def is_going(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        """What this attempt has printed so far."""
        with open(self.log, "rb") as file:
            file.seek(self.began)
            return file.read().decode(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The driver and all of its descendants, as far as they still hang together."""
        try:
            root = psutil.Process(self.process.pid)
            found = [root, *root.children(recursive=True)]
        except psutil.Error:
            return []
        self.seen.update(found)
        return found

    def kill(self, whom: str, rng: random.Random) -> bool:
        """SIGKILL one of KILLS; False where there is none of that sort at the moment."""
        family = self.family()
        sorts: dict[str, Callable[[str], bool]] = {
            "worker": lambda line: line.startswith("ray::") and not line.startswith(AGENTS),
            "rank": lambda line: line.startswith("ray::") and "RayTrainWorker" in line,
            "reader": lambda line: line.startswith("ray::_Reader"),
            "decoder": lambda line: "pipelines.ingest.decoder" in line,
            "head": lambda line: (
                "raylet/raylet " in line or "gcs/gcs_server " in line or line.startswith(AGENTS)
            ),
        }
        if whom in sorts:
            found = [one for one in family if sorts[whom](_line(one))]
            victims = [rng.choice(found)] if found else []
        else:
            victims = family if whom == "group" else family[:1]
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        return bool(victims)

    def wait(self, seconds: float) -> bool:
        """Wait for the end; False where it has not come."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def sweep(self) -> None:
        """End what is left of it, by the processes that were seen."""
        self.family()
        for one in self.seen:
            with contextlib.suppress(psutil.Error):
                if one.is_running():
                    one.kill()
        self.process.wait()


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) + " "
    except psutil.Error:
        return ""


# --------------------------------------------------------------------------------- a full disk


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own on `folder`, in memory; needs leave to mount (see `own_namespace`)."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "chaos", folder], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def own_namespace() -> None:
    """Go on as root of a namespace of this process's own, where mounting takes no rights."""
    if os.environ.get("CHAOS_NAMESPACE"):
        return
    os.environ["CHAOS_NAMESPACE"] = "1"
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        raise SystemExit("the disk fault needs user namespaces (unshare --user --mount) to mount")
    os.execvp("unshare", [*command, sys.executable, *sys.argv])


def fill(folder: Path) -> Path:
    """Fill a file system to the brim; returns the file that does."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    return ballast


# ----------------------------------------------------------------------------- a failing store


class Line:
    """A TCP line to a server that can be cut: what comes at its port goes on to `target`.

    `state`: passes; refuses (connections are closed at once, those that are open too); hangs
    (they stay open and silent).
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.state = "passes"
        self.writers: set[asyncio.StreamWriter] = set()
        self.port: int = in_thread(self._open)

    async def _open(self) -> int:
        self.loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    def turn(self, state: str) -> None:
        self.state = state
        if state != "hangs":  # those that hung are cut, as by a server that comes back
            self.loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            if self.state == "refuses":
                return
            there = await asyncio.open_connection("127.0.0.1", self.target)
            await asyncio.gather(self._copy(reader, there[1]), self._copy(there[0], writer))
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


def in_thread(start: Callable[[], Any]) -> Any:
    """Run a coroutine in a loop of its own, which goes on; returns what it returned."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return asyncio.run_coroutine_threadsafe(start(), loop).result()


def until(true: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is so; False where it is not after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.03)
    return True
