"""S3 on loopback: moto's server, and a proxy in front of it that fails and stalls as a bad network does."""

import functools
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import boto3
import botocore.session
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "bucket"

# A client reads the same megabytes of JSON as the one before it, and these tests make some hundred clients.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of an S3 server with one empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        endpoint = f"http://127.0.0.1:{port}"
        client(endpoint).create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        server.stop()


@functools.cache
def client(endpoint: str) -> Any:
    """A plain client: the second route by which tests look at what was stored."""
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )


def environment(endpoint: str) -> dict[str, str]:
    """What a user exports to work with the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Work with the server in this test."""
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)


def upload(endpoint: str, directory: Path, prefix: str) -> str:
    """Copy a tree; returns the URL of the copy. An empty directory becomes what consoles make of it."""
    s3 = client(endpoint)
    for path in directory.rglob("*"):
        key = f"{prefix}/{path.relative_to(directory).as_posix()}"
        if path.is_file() and not path.name.startswith("."):
            s3.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
        elif path.is_dir() and not any(path.iterdir()):
            s3.put_object(Bucket=BUCKET, Key=f"{key}/", Body=b"")
    return f"s3://{BUCKET}/{prefix}"


class FaultyProxy:
    """Passes requests on to ``endpoint``, but some fail.

    Args:
        failing: share of requests that end with a 500, a reset before the answer or a reset in the middle of it.
        stalling: share of requests that are never answered.
        seed: of the choice; a function of the request's number alone.
    """

    def __init__(self, endpoint: str, failing: float = 0.0, stalling: float = 0.0, seed: int = 0) -> None:
        self.requests: Counter[str] = Counter()
        """Requests by method and path, answered or not."""
        self.faults: Counter[str] = Counter()
        """Faults by kind."""
        self._upstream = urlsplit(endpoint)
        self._failing, self._stalling = failing, stalling
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # or a client that expects "100 Continue" would wait for it in vain

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if self.raw_requestline and self.parse_request():
                    proxy._answer(self)
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # the client went away: what this proxy is for

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.requests[f"{request.command} {urlsplit(request.path).path}"] += 1
            draw, kind = self._random.random(), self._random.choice(["500", "reset", "cut"])
        if draw >= self._failing + self._stalling:
            kind = "none"
        elif draw >= self._failing:
            kind = "stall"
        with self._lock:
            self.faults[kind] += 1
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if kind == "stall":
            self._closing.wait(60)
        elif kind == "reset":
            _reset(request.connection)
        elif kind == "500":
            request.wfile.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            self._pass_on(request, body, cut=kind == "cut")

    def _pass_on(self, request: BaseHTTPRequestHandler, body: bytes, cut: bool) -> None:
        upstream = http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port, timeout=30)
        try:
            upstream.request(
                request.command, request.path, body, {k: v for k, v in request.headers.items() if k != "Expect"}
            )
            answer = upstream.getresponse()
            content = answer.read()
            lines = [f"HTTP/1.1 {answer.status} {answer.reason}", "Connection: close"]
            lines += [
                f"{name}: {value}" for name, value in answer.getheaders() if name not in ("Connection", "Keep-Alive")
            ]
            request.wfile.write("\r\n".join([*lines, "", ""]).encode() + content[: len(content) // 2 if cut else None])
            request.wfile.flush()
            if cut:
                _reset(request.connection)
        finally:
            upstream.close()


def _reset(connection: socket.socket) -> None:
    """Make closing send a reset instead of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def unused_endpoint() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
