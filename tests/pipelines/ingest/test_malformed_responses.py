"""Malformed responses, one case each: which are accepted, and the failure class of the others.

Servers on loopback write raw bytes. The bytes after a PAUSE are sent in a packet of their own, which
can change what the strict parser does.
"""

from __future__ import annotations

import gzip
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipelines.ingest.web.addresses import public_socket
from pipelines.ingest.web.completeness import is_complete
from pipelines.ingest.web.lenient import MAX_HEADERS
from tests.pipelines.ingest.sites import fetch_all, statuses

PAUSE, RESET = "pause", "reset"
Pieces = list[bytes | str]

JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 8 + b"\xff\xd9"
L = len(JPEG)
OTHER = JPEG[:-2] + b"!\xff\xd9"  # another picture of almost the same length


class RawSite:
    """A server that sends raw bytes for a path and closes; counts requests and connections."""

    def __init__(self) -> None:
        self.answers: dict[str, Pieces] = {}
        self.requests: Counter[str] = Counter()
        self.heads: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    if not (piece := connection.recv(65536)):
                        return
                    head += piece
                self._answer(connection, head)
            except OSError:
                pass

    def _answer(self, connection: socket.socket, head: bytes) -> None:
        path = head.split(b" ", 2)[1].decode()
        self.requests[path] += 1
        self.heads.append(head)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in self.answers[path]:
            if piece == PAUSE:
                time.sleep(0.05)
            elif piece == RESET:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            else:
                assert isinstance(piece, bytes)
                connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(2)
        connection.recv(1)  # until the client has closed


@pytest.fixture
def raw() -> Iterator[RawSite]:
    site = RawSite()
    yield site
    site.listener.close()


def head(
    *extra: str | bytes,
    length: int | None = None,
    line: str = "HTTP/1.1 200 OK",
    kind: str | None = "image/jpeg",
) -> bytes:
    lines = [line.encode()]
    if kind is not None:
        lines.append(f"Content-Type: {kind}".encode())
    if length is not None:
        lines.append(f"Content-Length: {length}".encode())
    lines += [more if isinstance(more, bytes) else more.encode() for more in extra]
    return b"\r\n".join([*lines, b"", b""])


def chunks(body: bytes, end: bytes = b"0\r\n\r\n", more: int = 0, ext: bytes = b"") -> bytes:
    """`body` in two chunks whose sizes are too large by `more`."""
    parts = (body[:700], body[700:])
    return b"".join(b"%x%s\r\n%s\r\n" % (len(p) + more, ext, p) for p in parts) + end


def packed(coding: str, body: bytes) -> bytes:
    return head(f"Content-Encoding: {coding}", length=len(body)) + body


def whole(*extra: str | bytes, **given: Any) -> Pieces:
    return [head(*extra, length=L, **given) + JPEG]


CHUNKED = "Transfer-Encoding: chunked"
BR, ZSTD = (pa.compress(JPEG, codec, asbytes=True) for codec in ("brotli", "zstd"))
GZIP = gzip.compress(JPEG)

# Behaviours that curl, urllib or browsers take, and that bring the picture to the letter.
TAKEN: dict[str, Pieces] = {
    # status lines
    "http_1_0": whole(line="HTTP/1.0 200 OK"),
    "http_2_0": whole(line="HTTP/2.0 200 OK"),
    "http_without_version": whole(line="HTTP 200 OK"),
    "icy": whole(line="ICY 200 OK"),
    "lower_case": whole(line="http/1.1 200 ok"),
    "no_reason": whole(line="HTTP/1.1 200"),
    "blanks_in_line": whole(line="HTTP/1.1  200  OK"),
    "latin_reason": whole(line="HTTP/1.1 200 très bien"),
    "blank_in_version": whole(line="HTTP/ 1.1 200 OK"),
    "status_0200": whole(line="HTTP/1.1 0200 OK"),
    "status_glued": whole(line="HTTP/1.1 200OK"),
    "reason_of_9_kB": whole(line="HTTP/1.1 200 " + "x" * 9000),
    "blank_lines_before": [b"\r\n\r\n", *whole()],
    "status_201": whole(line="HTTP/1.1 201 Created"),
    "status_203": whole(line="HTTP/1.1 203 Non-Authoritative"),
    "status_206_whole": whole(f"Content-Range: bytes 0-{L - 1}/{L}", line="HTTP/1.1 206 Partial"),
    "status_206_bare_range": whole(f"Content-Range: 0-{L - 1}/{L}", line="HTTP/1.1 206 Partial"),
    "status_202": whole(line="HTTP/1.1 202 Accepted"),
    "status_205": whole(line="HTTP/1.1 205 Reset Content"),
    "status_218": whole(line="HTTP/1.1 218 This is fine"),
    "status_226": whole(line="HTTP/1.1 226 IM Used"),
    "early_hints": [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", *whole()],
    "continue": [b"HTTP/1.1 100 Continue\r\n\r\n", PAUSE, *whole()],
    # headers
    "lf_only": [head(length=L).replace(b"\r\n", b"\n") + JPEG],
    "mixed_ends": [head("X: y", length=L).replace(b"\r\n", b"\n", 2) + JPEG],
    "no_colon": whole("This is no header"),
    "no_colon_later": [head("This is no header", length=L), PAUSE, JPEG],
    "blank_before_colon": whole("X-Foo : bar"),
    "blank_before_length": [head(f"Content-Length : {L}") + JPEG],
    "blanks_in_name": whole("X Foo(bar): baz"),
    "name_not_ascii": whole("X-Fö: bar"),
    "no_name": whole(": bar"),
    "html_warning": whole("<b>Warning</b>: mysql in /x on line 3<br />"),
    "status_line_twice": whole("HTTP/1.1 200 OK"),
    "quoted_name": whole('"X-Foo": bar'),
    "folded_length": [head("Content-Length:", f"  {L}") + JPEG],
    "folded": whole("X-Foo: a", "\tb", "  c"),
    "folded_at_first": whole(line="HTTP/1.1 200 OK\r\n X: y"),
    "latin_value": whole(b"X-Foo: caf\xe9 \x80"),
    "nul_value": whole(b"X-Foo: a\0b"),
    "control_value": whole(b"X-Foo: a\x01\x7fb"),
    "bare_cr_value": whole(b"X-Foo: a\rb"),
    "value_of_9_kB": whole("Set-Cookie: " + "x" * 9000),
    "value_of_64_kB": whole("Content-Security-Policy: " + "x" * 65000),
    "headers_of_250_kB": whole(*(f"X-{i}: {'y' * 10_000}" for i in range(25))),
    "headers_300": whole(*(f"X-{i}: {'y' * 50}" for i in range(300))),
    "type_twice": whole("Content-Type: image/png"),
    "location_twice": whole("Location: /a", "Location: /b"),
    "etag_twice": whole('ETag: "a"', 'ETag: "b"'),
    "no_type": whole(kind=None),
    "odd_type": whole(kind="image/jpeg; ;=,é"),
    "type_html": whole(kind="text/html; charset=utf-8"),
    "type_empty": whole(kind=""),
    "upgrade": whole("Upgrade: h2,h2c", "Connection: Upgrade"),
    "keep_alive_and_closes": whole("Connection: keep-alive"),
    # lengths
    "no_length": [head() + JPEG],
    "length_twice": whole(f"Content-Length: {L}"),
    "length_listed": [head(f"Content-Length: {L}, {L}") + JPEG],
    "length_padded": [head(f"Content-Length: 00{L} ") + JPEG],
    "length_word": [head("Content-Length: abc") + JPEG],
    "length_negative": [head("Content-Length: -1") + JPEG],
    "length_empty": [head("Content-Length: ") + JPEG],
    "length_with_plus": [head(f"Content-Length: +{L}") + JPEG],
    "length_with_unit": [head(f"Content-Length: {L} bytes") + JPEG],
    "length_fraction": [head(f"Content-Length: {L}.0") + JPEG],
    "length_beyond_64_bits": [head(f"Content-Length: {2**64 - 1}0") + JPEG],
    "length_and_a_word": whole("Content-Length: abc"),
    "length_too_large": [head(length=L + 500) + JPEG],
    "length_and_chunked": [head(CHUNKED, length=L) + chunks(JPEG)],
    "wrong_length_and_chunked": [head(CHUNKED, length=7) + chunks(JPEG)],
    "bytes_behind": [head(length=L) + JPEG + b"x" * 500],
    "line_behind": [head(length=L) + JPEG + b"\r\n"],
    "page_behind": [head(length=L) + JPEG + b"\n<!-- 0.1 s -->\n"],
    "bytes_behind_later": [head(length=L) + JPEG, PAUSE, b"x" * 500],
    "bytes_behind_the_half": [head(length=L) + JPEG[:500], PAUSE, JPEG[500:] + b"x" * 500],
    "bytes_behind_close": [*whole("Connection: close"), b"x" * 500],
    "answer_behind": [head(length=L) + JPEG + head(length=L) + OTHER],
    # transfer codings
    "te_identity": whole("Transfer-Encoding: identity"),
    "te_identity_alone": [head("Transfer-Encoding: identity") + JPEG],
    "te_unknown": whole("Transfer-Encoding: none"),
    "te_twice": [head(CHUNKED, CHUNKED) + chunks(JPEG)],
    "te_upper": [head("TRANSFER-ENCODING: Chunked") + chunks(JPEG)],
    "te_gzip_chunked": [head("Transfer-Encoding: gzip, chunked") + chunks(GZIP)],
    "te_chunked_identity": [head("Transfer-Encoding: chunked, identity") + chunks(JPEG)],
    "te_quoted": [head('Transfer-Encoding: "chunked"') + chunks(JPEG)],
    "te_parameter": [head("Transfer-Encoding: chunked;q=1") + chunks(JPEG)],
    "te_in_http_1_0": [head(CHUNKED, line="HTTP/1.0 200 OK") + chunks(JPEG)],
    "te_blank_before_colon": [head("Transfer-Encoding : chunked") + chunks(JPEG)],
    "chunked_by_name": [head(CHUNKED) + JPEG],
    "chunked_by_name_with_length": whole(CHUNKED),
    "chunk_extension": [head(CHUNKED) + chunks(JPEG, ext=b";name=v")],
    "chunk_size_blanks": [head(CHUNKED) + chunks(JPEG, ext=b"  ")],
    "chunk_size_words": [head(CHUNKED) + chunks(JPEG, ext=b" bytes")],
    "chunk_size_zeros": [head(CHUNKED) + b"0000%x\r\n%s\r\n0\r\n\r\n" % (L, JPEG)],
    "chunk_lf_only": [head(CHUNKED) + b"%x\n%s\n0\n\n" % (L, JPEG)],
    "chunk_trailers": [head(CHUNKED) + chunks(JPEG, end=b"0\r\nX-Sum: 1\r\n\r\n")],
    "chunk_odd_trailers": [head(CHUNKED) + chunks(JPEG, end=b"0\r\nno trailer\r\n\r\n")],
    "chunk_no_last_line": [head(CHUNKED) + chunks(JPEG, end=b"0\r\n")],
    "no_last_chunk": [head(CHUNKED) + chunks(JPEG, end=b"")],
    "no_last_chunk_later": [head(CHUNKED), PAUSE, chunks(JPEG, end=b"")],
    "no_last_chunk_line": [head(CHUNKED) + chunks(JPEG, end=b"")[:-2]],
    "one_chunk_too_large": [head(CHUNKED) + b"%x\r\n%s" % (L + 50, JPEG)],
    "no_last_chunk_gzip": [head(CHUNKED, "Content-Encoding: gzip") + chunks(GZIP, end=b"")],
    "bytes_behind_chunks": [head(CHUNKED) + chunks(JPEG) + b"x" * 50],
    # content codings
    "gzip": [packed("gzip", GZIP)],
    "x_gzip": [packed("X-GZip", GZIP)],
    "gzip_lie": [packed("gzip", JPEG)],
    "gzip_cut": [packed("gzip", GZIP[:-8])],
    "gzip_junk_behind": [packed("gzip", GZIP + b"junk")],
    "gzip_twice": [packed("gzip, gzip", gzip.compress(GZIP))],
    "gzip_twice_by_name": [packed("gzip, gzip", GZIP)],
    "gzip_two_headers": [packed("gzip\r\nContent-Encoding: gzip", gzip.compress(GZIP))],
    "gzip_quoted": [packed('"gzip"', GZIP)],
    "gzip_parameter": [packed("gzip ;q=1", GZIP)],
    "gzip_and_identity": [packed("identity, gzip", GZIP)],
    "gzip_then_identity": [packed("gzip\r\nContent-Encoding: identity", GZIP)],
    "identity_then_gzip": [packed("identity\r\nContent-Encoding: gzip", GZIP)],
    "gzip_and_aws_chunked": [packed("aws-chunked,gzip", GZIP)],
    "deflate": [packed("deflate", zlib.compress(JPEG))],
    "deflate_raw": [packed("deflate", zlib.compress(JPEG)[2:-4])],
    "deflate_is_gzip": [packed("deflate", GZIP)],
    "deflate_lie": [packed("deflate", JPEG)],
    "br": [packed("br", BR)],
    "br_lie": [packed("br", JPEG)],
    "zstd": [packed("zstd", ZSTD)],
    "zstd_lie": [packed("zstd", JPEG)],
    "gzip_br": [packed("br, gzip", gzip.compress(BR))],
    "br_chunked": [head(CHUNKED, "Content-Encoding: br") + chunks(BR)],
    "aws_chunked": [packed("aws-chunked", JPEG)],
    "coding_binary": [packed("binary", JPEG)],
    "coding_charset": [packed("utf-8", JPEG)],
    "coding_empty": [packed("", JPEG)],
    "codings_9_by_name": [packed(", ".join(["gzip"] * 9), JPEG)],
}

# The rest, by its class.
REFUSED: dict[str, tuple[str, Pieces]] = {
    "no_http": ("protocol", [JPEG]),
    "status_of_2_digits": ("protocol", whole(line="HTTP/1.1 20 OK")),
    "lengths_differ": ("protocol", whole("Content-Length: 7")),
    "lengths_differ_listed": ("protocol", [head(f"Content-Length: 7, {L}") + JPEG]),
    "chunks_too_large": ("protocol", [head(CHUNKED) + chunks(JPEG, more=50)]),
    "chunks_too_small": ("protocol", [head(CHUNKED) + chunks(JPEG, more=-50)]),
    "chunk_size_no_number": ("protocol", [head(CHUNKED) + b"zz\r\n" + JPEG]),
    "chunk_size_later": ("protocol", [head(CHUNKED) + b"1\r\n\xff\r\n", PAUSE, b"zz\r\n" + JPEG]),
    "interim_for_ever": ("protocol", [b"HTTP/1.1 100 Continue\r\nodd\r\n\r\n" * 50, *whole()]),
    "headers_of_300_kB": ("protocol", whole(*(f"X-{i}: {'y' * 10_000}" for i in range(30)))),
    "headers_3000": ("protocol", whole(*(f"X-{i}: y" for i in range(3000)))),
    "status_206_part": (
        "partial",
        whole(f"Content-Range: bytes 0-{L - 1}/{L + 9}", line="HTTP/1.1 206 Partial"),
    ),
    "status_206_end": ("partial", whole(f"Content-Range: bytes 9-{L}/{L}", line="HTTP/1.1 206 P")),
    "status_206_unknown": ("partial", whole("Content-Range: bytes 0-9/*", line="HTTP/1.1 206 P")),
    "status_206_bare": ("partial", whole(line="HTTP/1.1 206 Partial")),
    "chunk_size_0x": ("protocol", [head(CHUNKED) + b"0x%x\r\n%s\r\n0\r\n\r\n" % (L, JPEG)]),
    "status_204": ("http_other", [head(line="HTTP/1.1 204 No Content")]),
    "status_204_body": ("http_other", whole(line="HTTP/1.1 204 No Content")),
    "status_304": ("http_other", [head(line="HTTP/1.1 304 Not Modified")]),
    "status_300": ("http_other", [head(line="HTTP/1.1 300 Choices", length=0)]),
    "status_999": ("http_other", [head(line="HTTP/1.1 999 Denied", length=0)]),
    "status_404_malformed": ("http_404", [head("no header", line="HTTP/1.1 404 None", length=0)]),
    "status_500_malformed": ("http_5xx", [head("no header", line="HTTP/1.1 500 No", length=0)]),
    "redirect_to_nothing": ("redirects", [head("Location: ", line="HTTP/1.1 302 F", length=0)]),
    "gzip_damaged": ("encoding", [packed("gzip", GZIP[:100] + bytes(50) + GZIP[150:])]),
    "gzip_of_nothing": ("not_an_image", [packed("gzip", b"")]),
    "br_damaged": ("encoding", [packed("br", b"\x1b\0\0" + b"\x11" * 37)]),
    "zstd_cut": ("encoding", [packed("zstd", ZSTD[:-9])]),
    "codings_9": ("encoding", [packed(", ".join(["gzip"] * 9), GZIP)]),
    "length_0": ("not_an_image", [head(length=0) + JPEG]),
    "page_malformed": ("not_an_image", [head("no header", kind="text/html") + b"<html>" * 99]),
    "opted_out_malformed": ("opted_out", whole("no header", "X-Robots-Tag : noai")),
    "opted_out_folded": ("opted_out", whole("no header", "X-Robots-Tag: nofollow,", " noai")),
    # Cut short: another attempt may mend it.
    "cut_length": ("refused", [head(length=L) + JPEG[:500]]),
    "cut_chunk": ("refused", [head(CHUNKED) + chunks(JPEG)[:500]]),
    "cut_between_chunks": ("refused", [head(CHUNKED) + chunks(JPEG[:900], end=b"")]),
    "cut_malformed_length": ("refused", [head("no header", length=L) + JPEG[:500]]),
    "cut_malformed_chunk": ("refused", [head("no header", CHUNKED) + chunks(JPEG)[:500]]),
    "cut_malformed_headers": ("refused", [head("no header")[:-4]]),
    "whole_and_reset": ("refused", [head(length=L + 9) + JPEG, PAUSE, RESET]),
    "silence": ("refused", []),
}


def test_malformed_responses_are_accepted(raw: RawSite, open_downloader: Any) -> None:
    raw.answers = {f"/{name}": pieces for name, pieces in TAKEN.items()}
    downloader = open_downloader(retries=0, read_timeout=5, concurrency_per_host=64)
    found = fetch_all(downloader, *(raw.url(path) for path in raw.answers))
    wrong = {n: f for n, f in zip(TAKEN, found, strict=True) if (f.status, f.data) != ("ok", JPEG)}
    assert wrong == {}
    assert max(raw.requests.values()) == 2  # the lenient client sends one request


def test_the_other_responses_have_their_class(raw: RawSite, open_downloader: Any) -> None:
    raw.answers = {f"/{name}": pieces for name, (_, pieces) in REFUSED.items()}
    downloader = open_downloader(retries=0, read_timeout=5, concurrency_per_host=64)
    found = statuses(downloader, *(raw.url(path) for path in raw.answers))
    expected = {name: f"download:{kind}" for name, (kind, _) in REFUSED.items()}
    assert dict(zip(REFUSED, found, strict=True)) == expected


def test_well_formed_responses_need_one_request(raw: RawSite, open_downloader: Any) -> None:
    wellformed = [
        "http_1_0",
        "status_201",
        "status_206_whole",
        "chunk_extension",
        "gzip",
        "br",
        "zstd",
    ]
    wellformed += ["gzip_lie", "no_length", "early_hints"]
    raw.answers = {f"/{name}": TAKEN[name] for name in wellformed}
    found = statuses(open_downloader(), *(raw.url(path) for path in raw.answers))
    assert found == ["ok"] * len(wellformed)
    assert set(raw.requests.values()) == {1}


def test_a_300_with_a_location_is_followed(raw: RawSite, open_downloader: Any) -> None:
    line = "HTTP/1.1 300 Multiple Choices"
    raw.answers = {"/300": [head("Location: /image", line=line, length=0)], "/image": whole()}
    assert statuses(open_downloader(), raw.url("/300")) == ["ok"]


# ---------------------------------------------------------------------------------------- safety


def test_bytes_behind_a_response_are_not_taken_for_the_next(
    raw: RawSite, open_downloader: Any
) -> None:
    """In the packet of the body, in the next one, and while the connection is idle."""
    hidden = head(length=len(OTHER)) + OTHER
    raw.answers = {
        "/1": [head(length=L) + JPEG + hidden],
        "/2": [head(length=L) + JPEG[:500], PAUSE, JPEG[500:] + hidden],
        "/3": [head(length=L) + JPEG, PAUSE, hidden, PAUSE],
        "/4": [head("no header", length=L) + JPEG + hidden],
        "/5": [head(CHUNKED) + chunks(JPEG) + hidden],
        "/6": [head(CHUNKED, length=3) + chunks(JPEG) + hidden],
        **{f"/plain{i}": whole() for i in range(6)},
    }
    downloader = open_downloader(retries=1, read_timeout=5, concurrency=1, concurrency_per_host=1)
    paths = [path for i in range(6) for path in (f"/{i + 1}", f"/plain{i}")]
    for path in paths:
        (fetched,) = fetch_all(downloader, raw.url(path))
        time.sleep(0.1 if path == "/3" else 0)  # what comes behind the next request is its answer
        assert (path, fetched.status, fetched.data) == (path, "ok", JPEG)
    assert set(raw.requests) == set(paths)  # each was really asked for


def test_the_lenient_client_reaches_no_private_address(
    raw: RawSite, open_downloader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directly, by a redirect, or by a name that changes its address between look-ups."""
    opened: list[str] = []

    def once(info: Any) -> socket.socket:
        """The first socket is taken for public, the others are really checked."""
        opened.append(info[4][0])
        return socket.socket(*info[:3]) if len(opened) == 1 else public_socket(info)

    raw.answers = {"/malformed": whole("no header"), "/secret": whole()}
    downloader = open_downloader({"socket_factory": once}, allow_private=False, retries=0)
    assert statuses(downloader, raw.url("/malformed")) == ["download:blocked_address"]
    assert (raw.requests["/malformed"], len(opened)) == (1, 2)

    def here(info: Any) -> socket.socket:
        return socket.socket(*info[:3]) if info[4][0] == "127.0.0.1" else public_socket(info)

    places = [f"http://[::1]:{raw.port}/secret", "http://2130706433/secret", "http://10.0.0.1/"]
    for number, place in enumerate(places):
        line = "HTTP/1.1 302 Found"
        raw.answers[f"/r{number}"] = [head("no header", f"Location: {place}", line=line, length=0)]
    downloader = open_downloader({"socket_factory": here}, allow_private=False, retries=0)
    found = statuses(downloader, *(raw.url(f"/r{number}") for number in range(3)))
    assert found == ["download:blocked_address"] * 3
    assert not raw.requests["/secret"]


def test_a_slow_look_up_does_not_count_for_the_connection(
    raw: RawSite, open_downloader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both clients a look-up may take as long as the whole request."""

    def resolver(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        looked_up.append(host)
        time.sleep(0.15)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    looked_up: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    raw.answers = {"/wellformed": whole(), "/malformed": whole("no header")}
    downloader = open_downloader(connect_timeout=0.1, retries=0, read_timeout=5)
    urls = [f"http://{path}.test:{raw.port}/{path}" for path in ("wellformed", "malformed")]
    assert statuses(downloader, *urls) == ["ok", "ok"]
    assert sorted(looked_up) == ["malformed.test", "malformed.test", "wellformed.test"]


def test_limits_and_time_outs_apply_to_the_lenient_client(
    raw: RawSite, open_downloader: Any
) -> None:
    million = JPEG + bytes(1 << 20)
    bombs = {
        "gzip": gzip.compress(JPEG + bytes(8 << 20)),
        "br": pa.compress(JPEG + bytes(8 << 20), "brotli", asbytes=True),
        "zstd": pa.compress(JPEG + bytes(8 << 20), "zstd", asbytes=True),
    }
    odd = "no header"
    raw.answers = {
        "/announced": [head(odd, length=1 << 20) + JPEG],
        "/digits": [head(odd, f"Content-Length: {'9' * 18}") + JPEG],
        "/endless": [head(odd), *[million] * 2],
        "/chunked": [head(odd, CHUNKED), *[b"%x\r\n%s\r\n" % (len(million), million)] * 2],
        "/chunk": [head(odd, CHUNKED), b"ffffffffffff\r\n", *[million] * 2],
        **{f"/{name}": [head(odd, f"Content-Encoding: {name}") + b] for name, b in bombs.items()},
        "/line": [b"HTTP/1.1 200 OK\r\nno header\r\nX: ", b"y" * (2 * MAX_HEADERS)],
        "/first": [b"y" * (2 * MAX_HEADERS)],
        "/stalls": [head(odd, length=L) + JPEG[:500], *[PAUSE] * 10, JPEG[500:]],
        "/stalls_in_head": [head(odd)[:-4], *[PAUSE] * 10, b"\r\n\r\n"],
        "/trickles": [head(odd, length=L), *[b"\xff\xd8\xff", PAUSE] * 16],
    }
    slow = ["/stalls", "/stalls_in_head", "/trickles"]
    others = [path for path in raw.answers if path not in slow]
    limits = {"retries": 0, "max_bytes": 100_000, "concurrency_per_host": 64}
    patient = open_downloader(**limits)
    found = statuses(patient, *(raw.url(path) for path in others))
    kinds = ["too_large"] * 8 + ["protocol"] * 2
    assert dict(zip(others, found, strict=True)) == {
        path: f"download:{kind}" for path, kind in zip(others, kinds, strict=True)
    }
    hasty = open_downloader(**limits, read_timeout=0.3, total_timeout=0.6)
    found = statuses(hasty, *(raw.url(path) for path in slow))
    assert found == ["download:timeout"] * len(slow)
    for downloader in (patient, hasty):
        assert (downloader.budget.used, downloader.window.in_flight) == (0, 0)


def test_a_truncated_body_is_retried(raw: RawSite, open_downloader: Any) -> None:
    raw.answers = {
        "/malformed": REFUSED["cut_malformed_length"][1],
        "/wellformed": REFUSED["cut_length"][1],
    }
    found = statuses(open_downloader(retries=1), raw.url("/malformed"), raw.url("/wellformed"))
    assert found == ["download:refused"] * 2
    assert raw.requests == {"/malformed": 4, "/wellformed": 2}


def test_the_lenient_client_sends_the_same_request(raw: RawSite, open_downloader: Any) -> None:
    raw.answers = {"/a%20b?c=%2F": whole("no header")}
    downloader = open_downloader(contact="me@example.org")
    url = raw.url("/a%20b?c=%2F#there").replace("http://", "http://me:secret@")
    assert statuses(downloader, url) == ["ok"]
    strict, lenient = (sorted(text.lower().split(b"\r\n")) for text in raw.heads)
    assert [line for line in lenient if line != b"connection: close"] == strict


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (JPEG, True),
        (JPEG + b"\r\n\0\0", True),
        (JPEG[:-1], False),
        (b"\x89PNG\r\n\x1a\n" + bytes(9) + b"IEND\xaeB`\x82", True),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), False),
        (b"GIF89a" + bytes(9) + b"\0;", True),
        (b"GIF89a" + bytes(9), False),
        (b"RIFF\x0c\0\0\0WEBP" + bytes(8), True),
        (b"RIFF\x0d\0\0\0WEBP" + bytes(8), False),
        (b"BM\x10\0\0\0" + bytes(10), True),
        (b"BM\x11\0\0\0" + bytes(10), False),
        (b"\0\0\0\x14ftypavif" + bytes(8) + b"\0\0\0\x09mdat!", True),
        (b"\0\0\0\x14ftypavif" + bytes(8) + b"\0\0\0\x0amdat!", False),
        (b"\0\0\0\x14ftypavif" + bytes(8) + b"\0\0\0\0mdat!", False),
        (b"II*\0" + bytes(99), False),  # a format without an end
        (b"", False),
    ],
)
def test_files_that_are_complete(data: bytes, expected: bool) -> None:
    assert is_complete(data) is is_complete(bytearray(data)) is expected
