"""Connects a job to a Ray cluster, or starts a Ray for it, and ends the job when that Ray is lost."""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipelines.cli.signals import interrupt_on_signals
from pipelines.cli.waiting import waiting
from pipelines.execution.cluster import Cluster, InProcess, RayCluster
from vlv_model.config import Config
from vlv_model.errors import RunError, one_line

RAY_LOST = 3
"""Exit status of a job whose own Ray died."""
_NEEDED = ("raylet", "gcs_server")  # a Ray without one of these processes is lost
_POLL = 0.02  # seconds to wait for a signal that has come already
_GRACE = 30.0  # seconds that a job may take to end after SIGTERM or SIGHUP
_CONNECT = 20.0  # seconds for a connection to the head


def _one_number_or_two(value: Any) -> Any:
    pair = value if isinstance(value, list | tuple) else [value, value]
    numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if len(pair) != 2 or not numbers or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"expected an integer >= 1, or [least, most], got {value}")
    return value


PoolSize = Annotated[int | tuple[int, int], BeforeValidator(_one_number_or_two)]
"""A number of workers or actors, or the fewest and the most of them."""


def bounds(size: int | tuple[int, int]) -> tuple[int, int]:
    """Fewest and most of a PoolSize."""
    return (size, size) if isinstance(size, int) else size


class RayConfig(Config):
    """Which Ray the job runs on."""

    address: str | None = Field(
        None,
        description="a running cluster ('auto' or host:port), or 'in-process': no Ray, this process does all "
        "work (for a few images, or under a debugger; trainings need a Ray); default: RAY_ADDRESS "
        "where it is set (as in `ray job submit`), else the job starts a Ray of its own on this machine",
    )
    num_cpus: int | None = Field(None, ge=1, description="CPUs of the job's own Ray; default: all")
    object_store_gb: float | None = Field(
        None,
        ge=0.1,
        le=10_000,
        description="object store of the job's own Ray, in GB; default: Ray's own choice",
    )
    group: str | None = Field(
        None,
        pattern=r"^[a-z][a-z0-9_]*$",
        description="node group whose machines hold the job's models: a custom resource, of which each "
        "of these machines has 1 (cluster/sizes.yaml); default: any machine",
    )

    @property
    def cluster(self) -> str | None:
        """The address of the running cluster; None where the job starts its own Ray, or none."""
        return None if self.in_process else self.address or os.environ.get("RAY_ADDRESS")

    @property
    def in_process(self) -> bool:
        """Whether the job runs without a Ray."""
        return self.address == "in-process"

    def uses_gpu(self, use_gpu: bool | None, setting: str) -> bool:
        """The value of the setting `setting`; None: on a cluster, and on a machine that has a GPU.

        Raises RunError for true on a machine without a GPU, before a Ray is started in vain.
        """
        if self.cluster or use_gpu is False:
            # A cluster may start its machines with GPUs when they are asked for.
            return use_gpu is not False
        if use_gpu is None:
            return has_gpu()
        if not (has_gpu() or _ray_is_running()):
            raise RunError(
                f"{setting}=true: this machine has no GPU that torch can use: set {setting}=false to "
                "run on CPUs, or run on a cluster"
            )
        return True

    def pinned(self) -> dict[str, float]:
        """The resources by which Ray places a worker or an actor with a model on `group`."""
        return {self.group: 0.001} if self.group else {}


def has_gpu() -> bool:
    """Whether torch can use a GPU of this machine.

    torch takes seconds to import, so it is asked only where a GPU's driver is there.
    """
    if "torch" not in sys.modules and not (os.path.exists("/dev/kfd") or _has_cuda_driver()):
        return False
    import torch

    return torch.cuda.is_available()


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _ray_is_running() -> bool:
    """Whether this process is connected to a Ray, which knows its resources."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


# Messages of every start that nobody can act on, by logger.
_NOISE = {
    "DeepSpeed": "Setting accelerator to CPU",
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
    "ray.data._internal.progress": "Progress bars disabled",
}


def quiet_libraries() -> None:
    """Keep these messages off the console; the libraries' log files keep them."""
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return _NOISE[record.name] not in record.getMessage()


def _check_reachable(address: str) -> None:
    """Refuse a host:port where nobody listens; Ray would try it for two minutes and more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # 'auto', or an address that Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT).close()
    except (OSError, OverflowError) as error:  # OverflowError: no valid port number
        raise _no_ray(address, error) from None


def _no_ray(address: str, error: Exception) -> RunError:
    return RunError(
        f"no Ray answers at {address} ({one_line(error)}): start it (and give its "
        "token, if it has one), or leave ray.address and RAY_ADDRESS out"
    )


def _temporary_folder() -> str | None:
    """Where an embedded Ray keeps its sockets; None is its default.

    A socket's path has at most 107 bytes, and Ray puts 70 behind the folder for temporary files, which
    has a long path on many clusters with a batch scheduler.
    """
    fits = len(os.fsencode(tempfile.gettempdir())) <= 36
    return None if fits or "RAY_TMPDIR" in os.environ else f"/tmp/ray-{os.getuid()}"


@contextmanager
def ray_session(config: RayConfig) -> Iterator[Cluster]:
    """Connect to Ray while a job runs; a process that is connected already keeps its connection."""
    if config.in_process:
        yield InProcess()
        return
    import ray

    if ray.is_initialized():
        yield RayCluster()
        return
    quiet_libraries()
    # Short runs detect failures sooner, and each line of a worker is printed once.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address := config.cluster:
        _check_reachable(address)
        try:
            with waiting(f"connecting to Ray at {address}"):
                ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_ray(address, error) from None
    else:
        # A busy or sleeping machine is not lost; `_end_with_ray` notices a Ray that is.
        os.environ.setdefault("RAY_health_check_failure_threshold", "100")
        # The core worker logs large arguments of a restartable actor as an error at every start.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        store = config.object_store_gb
        try:
            with waiting("starting Ray"), _dropping(b"RAY_BACKEND_LOG_LEVEL"):
                ray.init(
                    "local",
                    num_cpus=config.num_cpus,
                    object_store_memory=int(store * 1e9) if store else None,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _temp_dir=_temporary_folder(),
                )
        except Exception as error:  # Ray raises that class itself
            raise RunError(
                f"Ray did not start on this machine ({one_line(error)}): try again when it has cores, "
                "memory and disk to spare, or give a running cluster by ray.address"
            ) from error
    try:
        with _end_by_signals() if config.cluster else _end_with_ray():
            yield RayCluster()
    finally:
        ray.shutdown()


@contextmanager
def _dropping(words: bytes) -> Iterator[None]:
    """Hold back what is written to standard error in here, and drop lines with `words` from it.

    Ray's core reports in a line of C++ that it reads its log level.
    """
    with tempfile.TemporaryFile() as held:
        try:
            stderr = os.dup(2)
        except OSError:  # it is closed
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, b"".join(line for line in held if words not in line))


@contextmanager
def _end_with_ray() -> Iterator[None]:
    """End this process when the raylet or the GCS of its own Ray has ended.

    Nobody restarts them. Ray itself waits a minute before its core ends the process, with C++ frames, or
    raises errors of many kinds. When a raylet exits normally, as after a kill of its agent, Ray's core may
    end a process that runs Ray Data first.
    """
    from ray._private.worker import _global_node as node

    over, reporting = threading.Event(), threading.Lock()

    def watch(name: str, process: subprocess.Popen[bytes], signalled: Callable[[], bool]) -> None:
        status = process.wait()
        if over.is_set():
            return
        by_signal = status in (0, -signal.SIGTERM, -signal.SIGHUP)
        if by_signal and signalled() and over.wait(_GRACE):
            return
        reporting.acquire()  # never released: one report is enough
        line = (
            f"error: Ray's {name} on this machine is gone (it or an agent of it was killed, or ran out "
            "of memory): the same command continues where this one stopped (with an output in an "
            "object store: after two minutes)"
        )
        try:
            os.write(2, f"\n{line}\n".encode())  # not print: a bar may hold its lock for ever
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        finally:
            os._exit(RAY_LOST)

    with _end_by_signals() as signalled:
        watches = [
            threading.Thread(target=watch, args=(name, one.process, signalled), daemon=True)
            for name in _NEEDED
            for one in node.all_processes.get(name, ())
        ]
        for thread in watches:
            thread.start()
        try:
            yield
        except Exception:
            for thread in watches:  # Ray may have noticed first
                thread.join(5 * _POLL)
            reporting.acquire()  # whoever reports ends the process
            raise
        finally:
            over.set()


@contextmanager
def _end_by_signals() -> Iterator[Callable[[], bool]]:
    """End the job by SystemExit after SIGTERM or SIGHUP; yields whether such a signal has come.

    Python's handlers wait for the main thread, which Ray may hold; the wake-up file of signals does not.
    A second signal is ignored: Ray's core sends one when its raylet is gone, which would abort the
    unwinding.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread gets signals
        yield lambda: False
        return

    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    def raises() -> bool:
        # An error of the lost Ray came first and is unwinding already.
        error = sys.exc_info()[1]
        return not isinstance(error, RayError) or isinstance(error, GetTimeoutError | RayTaskError)

    ours, signals = socket.socketpair()
    with ours, signals, interrupt_on_signals(raises) as asked:
        signals.setblocking(False)
        before = signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
        try:
            yield lambda: bool(select.select([ours], [], [], _POLL)[0])
        except (Exception, KeyboardInterrupt):
            if asked.status:
                sys.exit(asked.status)
            raise
        finally:
            signal.set_wakeup_fd(before)
        if asked.status:  # whatever the signal raised was swallowed
            sys.exit(asked.status)


def check_resources(
    config: RayConfig, cluster: Cluster, needed: Mapping[str, float], settings: str
) -> None:
    """Raise RunError for a request that would wait for ever; the line names `settings` as its source.

    A cluster may still grow, so there a line says what the job waits for.
    """
    there = cluster.resources()
    for resource, amount in needed.items():
        if there.get(resource, 0) >= amount:
            continue
        line = (
            f"{settings}: {amount:g} {resource}s are needed, {there.get(resource, 0):g} are there"
        )
        on_cpus = f"{settings.partition('.')[0]}.use_gpu=false"
        if config.cluster:
            print(
                f"{line}: waiting for the cluster to start nodes"
                + (f" ({on_cpus} runs on CPUs)" if resource == "GPU" else "")
            )
        elif resource == "GPU":
            raise RunError(f"{line}: set {on_cpus} to run on CPUs, or run on a cluster")
        else:
            raise RunError(
                f"{line}: ask for fewer, or set ray.num_cpus={amount:g} to share the cores"
            )
