"""Ray as the jobs use it: connecting to one, starting one, and what ends with it."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipelines.cli.signals import interrupt_on_signals
from pipelines.execution.cluster import Cluster, InProcess, RayCluster
from vlv_model.config import Config
from vlv_model.errors import RunError, one_line

RAY_LOST = 3  # exit status where the embedded Ray died
_NEEDED = ("raylet", "gcs_server")  # processes without which there is no Ray
_GLANCE = 0.02  # seconds in which what has happened is seen
_UNWINDING = 30.0  # seconds that a job may take to end after a SIGTERM or SIGHUP
_ANSWER = 20.0  # seconds that a head is given to take a connection


def _one_number_or_two(value: Any) -> Any:
    pair = value if isinstance(value, list | tuple) else [value, value]
    numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if len(pair) != 2 or not numbers or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"expected an integer >= 1, or [least, most], got {value}")
    return value


PoolSize = Annotated[int | tuple[int, int], BeforeValidator(_one_number_or_two)]
"""How many workers or actors: a number, or the fewest and the most of them."""


def bounds(size: int | tuple[int, int]) -> tuple[int, int]:
    """Fewest and most of a PoolSize."""
    return (size, size) if isinstance(size, int) else size


class RayConfig(Config):
    """Which Ray the job runs on."""

    address: str | None = Field(
        None,
        description="a running cluster ('auto' or host:port), or 'in-process': no Ray at all, chunks are "
        "worked on in this process, one after the other (a few images, a debugger; no training); "
        "default: RAY_ADDRESS where it is set (as in `ray job submit`), else a Ray of the job's own "
        "on this machine",
    )
    num_cpus: int | None = Field(
        None, ge=1, description="CPUs of a Ray of the job's own; default: all"
    )
    object_store_gb: float | None = Field(
        None,
        ge=0.1,
        le=10_000,
        description="object store of a Ray of the job's own, in GB; default: Ray's",
    )
    group: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="node group whose machines hold the job's models: a custom resource of "
        "which each of them has 1 (cluster/sizes.yaml); default: any",
    )

    @property
    def cluster(self) -> str | None:
        """Address of the cluster that the job runs on; None: a Ray of its own."""
        return None if self.in_process else self.address or os.environ.get("RAY_ADDRESS")

    @property
    def in_process(self) -> bool:
        """Whether there is no Ray at all."""
        return self.address == "in-process"

    def pinned(self) -> dict[str, float]:
        """The share of a node's `group` resource that a worker or actor with a model asks for."""
        return {self.group: 0.001} if self.group else {}


# What libraries say at every start and what nobody can act upon, by the logger that says it.
_NOISE = {
    "DeepSpeed": "Setting accelerator to CPU",
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
    "ray.data._internal.progress": "Progress bars disabled",
}


def quiet_libraries() -> None:
    """Keep the console for our own bars and errors; the libraries' log files keep all."""
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return _NOISE[record.name] not in record.getMessage()


def _quiet_ray_data() -> None:
    # Its loggers are set up when ray.data is imported; the file handlers are left as they are.
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.WARNING)


def _knock(address: str) -> None:
    """Refuse a host:port where nobody listens, which Ray would try for two minutes and more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # 'auto', or what Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
    except (OSError, OverflowError) as error:  # the latter: a port that no port can be
        raise _no_ray(address, error) from None


def _no_ray(address: str, error: Exception) -> RunError:
    return RunError(
        f"no Ray answers at {address} ({one_line(error)}): start it (and give its "
        "token, if it has one), or leave ray.address and RAY_ADDRESS out"
    )


@contextmanager
def ray_session(config: RayConfig) -> Iterator[Cluster]:
    """Connect to Ray for the duration of a job; a Ray that is already connected is shared."""
    if config.in_process:
        yield InProcess()
        return
    import ray

    if ray.is_initialized():
        yield RayCluster()
        return
    quiet_libraries()
    # Faster failure detection on short runs, and each line of a worker printed once.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address := config.cluster:
        _knock(address)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_ray(address, error) from None
    else:
        # A machine that was busy or asleep is not a lost one; `_ending_with_ray` sees what is lost.
        os.environ.setdefault("RAY_health_check_failure_threshold", "100")
        # The core worker logs a restartable actor's big arguments as an error on every start.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        store = config.object_store_gb
        try:
            ray.init(
                "local",
                num_cpus=config.num_cpus,
                object_store_memory=int(store * 1e9) if store else None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except Exception as error:  # Ray raises that class itself
            raise RunError(
                f"Ray did not start on this machine ({one_line(error)}): try again when it has cores, "
                "memory and disk to spare, or give a running cluster by ray.address"
            ) from error
    try:
        with _told_to_end() if config.cluster else _ending_with_ray():
            yield RayCluster()
    finally:
        ray.shutdown()


@contextmanager
def _ending_with_ray() -> Iterator[None]:
    """End this process when the embedded Ray's raylet or GCS has ended.

    Nobody starts them again, and Ray itself waits a minute for that before its core ends the
    process, with lines of C++, or raises errors of many kinds. Where a raylet ends in good order, as
    one does whose agent was killed, Ray's core may end a process first that Ray Data works in.
    """
    from ray._private.worker import _global_node as node

    over, saying = threading.Event(), threading.Lock()

    def watch(name: str, process: subprocess.Popen[bytes], told: Callable[[], bool]) -> None:
        status = process.wait()
        if over.is_set():
            return
        in_good_order = status in (0, -signal.SIGTERM, -signal.SIGHUP)
        if in_good_order and told() and over.wait(_UNWINDING):
            return
        saying.acquire()  # for good: once is enough
        line = (
            f"error: Ray's {name} on this machine is gone (it or an agent of it was killed, or ran out "
            "of memory): the same command continues where this one stopped (with an output in an "
            "object store: after two minutes)"
        )
        try:
            os.write(2, f"\n{line}\n".encode())  # a bar's lock may be held for ever
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        finally:
            os._exit(RAY_LOST)

    with _told_to_end() as told:
        watches = [
            threading.Thread(target=watch, args=(name, one.process, told), daemon=True)
            for name in _NEEDED
            for one in node.all_processes.get(name, ())
        ]
        for thread in watches:
            thread.start()
        try:
            yield
        except Exception:
            for thread in watches:  # Ray may be the first to notice
                thread.join(5 * _GLANCE)
            saying.acquire()  # who says it ends the process
            raise
        finally:
            over.set()


@contextmanager
def _told_to_end() -> Iterator[Callable[[], bool]]:
    """Whether a signal told this process to end (with its Ray, where all of a group got it).

    Python's own handlers wait for the main thread, which Ray may hold; the file that signals are
    written to as they come does not. The process ends by SystemExit, and is not told twice: Ray's
    core sends a second signal when its raylet is gone, and would abort what is being unwound.
    """
    if threading.current_thread() is not threading.main_thread():  # others may not listen
        yield lambda: False
        return

    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    def raises() -> bool:
        # An error of the Ray that is gone, which came first, is unwinding already.
        error = sys.exc_info()[1]
        return not isinstance(error, RayError) or isinstance(error, GetTimeoutError | RayTaskError)

    ours, signals = socket.socketpair()
    with ours, signals, interrupt_on_signals(raises) as asked:
        signals.setblocking(False)
        before = signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
        try:
            yield lambda: bool(select.select([ours], [], [], _GLANCE)[0])
        except (Exception, KeyboardInterrupt):
            if asked.status:
                sys.exit(asked.status)
            raise
        finally:
            signal.set_wakeup_fd(before)
        if asked.status:  # and what it raised was swallowed
            sys.exit(asked.status)


def check_resources(
    config: RayConfig, cluster: Cluster, needed: Mapping[str, float], settings: str
) -> None:
    """Refuse a job that would wait for ever; RunError names what is asked and what there is.

    A cluster may be asleep and grow, so there it is only said what is waited for. `settings` tells
    where the request comes from.
    """
    there = cluster.resources()
    for resource, amount in needed.items():
        if there.get(resource, 0) >= amount:
            continue
        line = (
            f"{settings}: {amount:g} {resource}s are needed, {there.get(resource, 0):g} are there"
        )
        if config.cluster:
            print(f"{line}: waiting for the cluster to start nodes")
        elif resource == "GPU":
            raise RunError(f"{line}: set use_gpu=false to run on CPUs, or run on a cluster")
        else:
            raise RunError(
                f"{line}: ask for fewer, or set ray.num_cpus={amount:g} to share the cores"
            )
