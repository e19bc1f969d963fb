"""Python processes that are forked from one that has torch and transformers loaded.

    python fork_server.py FOLDER        serves, until its standard input is closed
    FOLDER/python [-m MODULE | -c CODE | SCRIPT] ARGUMENT …

To import those libraries takes each process five to eight seconds, longer than most tests of a job
need it. `FOLDER/python` stands in for the interpreter: it passes its arguments, environment, folder
and streams to the server, which forks a process that runs the program as the interpreter would. What
is loaded is libraries alone: the project's code is imported by each process itself.

Ray starts its workers with `sys.executable`, so a Ray whose driver has FOLDER/python there has such
workers. Its agents are started as ever, since they look at who their parent is. Signals reach the
program, which is the leader of a session of its own; it ends when its stand-in is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

SOCKET, LOG = "socket", "log"
WORKERS = ("/setup_worker.py", "/default_worker.py")  # of Ray

# Those of models, training and recaptioning that are slow to import, as far down as they are used.
LIBRARIES = [
    "numpy", "pandas", "pyarrow.parquet", "pyarrow.dataset", "cv2", "PIL.Image", "torch", "torch._dynamo",
    "transformers.models.florence2.modeling_florence2", "transformers.models.clip.modeling_clip",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.bart.tokenization_bart",
    "transformers.models.clip.tokenization_clip", "transformers.models.auto.tokenization_auto",
    "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddpm", "diffusers.schedulers.scheduling_ddim", "peft", "aiohttp",
    "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer",  # which takes torch's compiler along
]  # fmt: skip

STAND_IN = """\
import json, os, signal, socket, sys, time
real, here = {real!r}, {socket!r}
words = sys.argv[1:]
script = next((word for word in words if not word.startswith("-")), "")
if "/ray/" in script and not script.endswith({workers!r}):
    os.execv(real, [real, *words])
limit = time.monotonic() + 200
while not os.path.exists(here):  # it is still importing
    time.sleep(0.05)
    if time.monotonic() > limit:
        sys.exit(open({log!r}).read() or "the server of forked processes does not start")
server = socket.socket(socket.AF_UNIX)
server.connect(here)
asked = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
server.sendall(asked)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda got, frame: server.sendall(bytes([got])))
status = int(server.recv(64) or b"255")
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def fork_server(folder: Path) -> Iterator[Path]:
    """The stand-in for the interpreter, `folder`/python, for as long as the block lasts.

    It is there at once, and waits itself until the server has imported all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stand_in, code = folder / "python", folder / "stand_in.py"
    places = {"socket": str(folder / SOCKET), "log": str(folder / LOG)}
    code.write_text(STAND_IN.format(real=sys.executable, workers=WORKERS, **places))
    stand_in.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(code))} "$@"\n'
    )
    stand_in.chmod(0o755)
    command = [sys.executable, __file__, str(folder)]
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / LOG, "wb") as log:
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | settings
        )
    assert server.stdin is not None
    try:
        yield stand_in
    finally:
        server.stdin.close()
        server.wait(30)


# ------------------------------------------------------------------------------------ the server


def serve(folder: Path) -> None:
    """Fork a process for each connection, and pass signals to it and its end back."""
    for name in LIBRARIES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / f".{SOCKET}"))
    listener.listen(64)
    (folder / f".{SOCKET}").rename(folder / SOCKET)  # there, and ready
    with selectors.DefaultSelector() as events:
        events.register(0, selectors.EVENT_READ)
        events.register(listener, selectors.EVENT_READ)
        running: list[Program] = []
        while True:
            for key, _ in events.select():
                if key.fd == 0:  # closed: the tests are over
                    for program in running:
                        program.signal(signal.SIGKILL)
                    os._exit(0)
                if key.fileobj is listener:
                    start(listener, events, running, str(folder / "python"))
                elif key.data in running:
                    follow(key.data, key.fd, events, running)


@dataclasses.dataclass(frozen=True)
class Program:
    process: int
    pidfd: int  # readable once the process has ended
    stand_in: socket.socket

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, number)


def start(
    listener: socket.socket,
    events: selectors.BaseSelector,
    running: list[Program],
    executable: str,
) -> None:
    """Fork the program that a stand-in asks for. The forked process does not come back from here."""
    stand_in, _ = listener.accept()
    asked = receive(stand_in)
    if asked is None:
        stand_in.close()
        return
    words, where, environment, streams = asked
    process = os.fork()
    if not process:
        listener.close()
        events.close()
        for other in running:
            other.stand_in.close()
            os.close(other.pidfd)
        stand_in.close()
        become(words, where, environment, streams, executable)
    for stream in streams:
        os.close(stream)
    program = Program(process, os.pidfd_open(process), stand_in)
    running.append(program)
    events.register(program.pidfd, selectors.EVENT_READ, program)
    events.register(stand_in, selectors.EVENT_READ, program)


def follow(
    program: Program, readable: int, events: selectors.BaseSelector, running: list[Program]
) -> None:
    """Pass on what has come: the end of the program, signals for it, or the end of its stand-in."""
    stand_in = program.stand_in
    if readable == program.pidfd:
        status = os.waitstatus_to_exitcode(os.waitpid(program.process, 0)[1])
        with contextlib.suppress(OSError):
            stand_in.sendall(str(status).encode())
        events.unregister(program.pidfd)
        with contextlib.suppress(KeyError):  # of one that was killed
            events.unregister(stand_in)
        os.close(program.pidfd)
        stand_in.close()
        running.remove(program)
        return
    signals = b""
    with contextlib.suppress(OSError):
        signals = stand_in.recv(16)
    if not signals:
        events.unregister(stand_in)
    for number in signals or [signal.SIGKILL]:
        program.signal(number)


def receive(stand_in: socket.socket) -> tuple[list[str], str, dict[str, str], list[int]] | None:
    """Arguments, folder, environment and streams of a program; None of a stand-in that was killed."""
    head, streams, _, _ = socket.recv_fds(stand_in, 8, 3)
    content = b""
    while len(head) == 8 and len(content) < int.from_bytes(head, "big"):
        more = stand_in.recv(1 << 16)
        if not more:
            break
        content += more
    if len(streams) < 3 or not content:
        return None
    words, where, environment = json.loads(content)
    return words, where, environment, list(streams)


# ----------------------------------------------------------------------------- a forked process


def become(
    words: Sequence[str],
    where: str,
    environment: dict[str, str],
    streams: Sequence[int],
    executable: str,
) -> NoReturn:
    """Run the program of an interpreter's arguments in this process, and end it."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", 0, closefd=False), write_through=True)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.chdir(where)
    # A Ray that the program starts has such workers, too; what a worker starts are plain processes.
    if not words[0].endswith(WORKERS):
        sys.executable = executable
    apply(environment)
    status = 0
    try:
        run([word for word in words if word not in ("-u", "-I", "-S", "-B")])
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # As the interpreter does at its end.
    import atexit
    import threading

    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    os._exit(status)


def apply(environment: dict[str, str]) -> None:
    """Make the environment this process's, and its PYTHONPATH the head of the module path."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    after = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = after + [path for path in sys.path if path not in (*before, *after)]


def run(words: list[str]) -> None:
    if words[0].endswith("/setup_worker.py"):
        words = settled(words[1:])
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    here = str(Path(__file__).parent)
    sys.path[:] = [path for path in sys.path if path not in ("", here)]
    if words[0] == "-m":
        import runpy

        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    if words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        exec(words[1], main.__dict__)
        return
    script = words[0]
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = words
    main.__file__ = script
    exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)


def settled(words: list[str]) -> list[str]:
    """What Ray's setup_worker.py makes of a worker's arguments: those of default_worker.py.

    The environment and the folder of a job (`runtime_env`) are applied here; nothing else is known.
    """
    left, context = [], {}
    for word in words:
        name, _, value = word.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value or "{}")
        elif name != "--language":
            left.append(word)
    settings = context.get("env_vars") or {}
    apply(os.environ | {name: os.path.expandvars(value) for name, value in settings.items()})
    before = shlex.split(" ".join(context.get("command_prefix") or []))
    if before:  # a working directory: cd FOLDER &&
        assert (before[0], before[2:]) == ("cd", ["&&"]), before
        os.chdir(before[1])
    return left


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
