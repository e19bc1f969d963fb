"""A proxy server on loopback, which knows names that no resolver does, and certificates for them."""

from __future__ import annotations

import asyncio
import base64
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from yarl import URL


class HttpProxy:
    """Forwards requests for `names` to their ports on loopback; answers 502 to all others.

    `asked` holds the first lines of all requests. It answers CONNECT with `connect_status`. With
    `login` (user:password) it answers 407 to requests without it, and always to requests for the host
    `locked`. With `silent` it never answers; it also never answers requests for the host `muted`.
    """

    def __init__(
        self,
        names: Mapping[str, int],
        login: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.names, self.login, self.tls = dict(names), login, tls
        self.connect_status = "200 Connection established"
        self.silent = False
        self.locked = self.muted = ""
        self.asked: list[str] = []
        self.port = 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.start()

    def url(self, login: str = "") -> str:
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{login + '@' if login else ''}127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._run(self._start())

    def stop(self) -> None:
        """End all connections and listen no more."""
        self._run(self._stop())

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _run(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result()  # type: ignore[arg-type]

    async def _start(self) -> None:
        self.serving: set[asyncio.Task[None]] = set()
        self.server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, ssl=self.tls, reuse_address=True
        )
        self.port = self.server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self.server.close()
        for task in self.serving:
            task.cancel()
        await asyncio.gather(*self.serving, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            self.serving.discard(task)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head.rstrip("\r\n").split("\r\n")
        self.asked.append(line)
        secret = base64.b64encode((self.login or "").encode()).decode()
        method, target, _ = line.split(" ")
        place = URL(f"http://{target}" if method == "CONNECT" else target)
        if self.silent or place.host == self.muted:
            await reader.read()
            return
        is_known = not self.login or f"Proxy-Authorization: Basic {secret}" in lines
        if not is_known or place.host == self.locked:
            await _say(writer, "407 Proxy Authentication Required")
            return
        port = self.names.get(place.host or "")
        if method == "CONNECT" and not self.connect_status.startswith("200"):
            await _say(writer, self.connect_status)
        elif port is None:
            await _say(writer, "502 Bad Gateway")
        else:
            behind, there = await asyncio.open_connection("127.0.0.1", port)
            if method == "CONNECT":
                await _say(writer, self.connect_status, "")
            else:
                kept = [one for one in lines if not one.startswith(("Proxy-", "Connection:"))]
                first = f"{method} {place.raw_path_qs} HTTP/1.1"
                there.write("\r\n".join([first, *kept, "Connection: close", "", ""]).encode())
            await asyncio.gather(_copy(reader, there), _copy(behind, writer))


async def _say(
    writer: asyncio.StreamWriter, status: str, more: str = "Content-Length: 0\r\n"
) -> None:
    writer.write(f"HTTP/1.1 {status}\r\n{more}\r\n".encode())
    await writer.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All that comes, until either end is closed."""
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    finally:
        writer.close()


@contextmanager
def proxied(*names: object, **options: object) -> Iterator[HttpProxy]:
    proxy = HttpProxy(*names, **options)  # type: ignore[arg-type]
    try:
        yield proxy
    finally:
        proxy.close()


def certificate(folder: Path, *names: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate that signs itself, and the context of a server that shows it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / f"{names[0]}.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(made.public_bytes(pem) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return file, context
