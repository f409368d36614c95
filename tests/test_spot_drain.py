"""A cloud's notice becomes Ray's drain: against a server on this machine that speaks the clouds' protocols."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.spot_drain import aws, azure, gcp

REPOSITORY = Path(__file__).parents[1]
DEADLINE = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
TOKEN = "a-token"


class Metadata(ThreadingHTTPServer):
    """The metadata service: ``answers`` by path; what lacks a cloud's own header is refused, as there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, str] = {}
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def notice(self, cloud: str, when: datetime = DEADLINE, vm: str = "me") -> None:
        event = {"EventId": "1", "EventType": "Preempt", "Resources": ["other", vm], "NotBefore": format_datetime(when)}
        self.answers |= {
            "aws": {"/latest/meta-data/spot/instance-action": json.dumps(
                {"action": "terminate", "time": f"{when:%Y-%m-%dT%H:%M:%SZ}"})},
            "gcp": {"/computeMetadata/v1/instance/preempted": "TRUE"},
            "azure": {"/metadata/scheduledevents": json.dumps({"DocumentIncarnation": 2, "Events": [event]})},
        }[cloud]  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        known = self.path == "/latest/api/token" and ttl is not None and 1 <= int(ttl) <= 21600
        self.reply(200 if known else 400, TOKEN if known else "")

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        allowed = {
            "latest": self.headers.get("X-aws-ec2-metadata-token") == TOKEN,
            "computeMetadata": self.headers.get("Metadata-Flavor") == "Google",
            "metadata": self.headers.get("Metadata") == "true" and "api-version=" in self.path,
        }[path.split("/")[1]]
        if self.server.broken:
            self.reply(503, "")
        elif not allowed:
            self.reply(401, "")
        else:
            self.reply(200 if path in self.server.answers else 404, self.server.answers.get(path, ""))

    def reply(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        server.answers = {
            "/computeMetadata/v1/instance/preempted": "FALSE",
            "/metadata/instance/compute/name": "me",
            "/metadata/scheduledevents": json.dumps({"DocumentIncarnation": 1, "Events": []}),
        }
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_no_notice(metadata: Metadata) -> None:
    assert (aws(metadata.url), gcp(metadata.url), azure(metadata.url)) == (None, None, None)


def test_what_a_notice_says(metadata: Metadata) -> None:
    for cloud in ("aws", "gcp", "azure"):
        metadata.notice(cloud)
    assert aws(metadata.url) == DEADLINE.timestamp()
    assert azure(metadata.url) == DEADLINE.timestamp()
    assert gcp(metadata.url) == pytest.approx(time.time() + 30, abs=5)


def test_another_machines_event_is_no_notice(metadata: Metadata) -> None:
    metadata.notice("azure", vm="someone")
    assert azure(metadata.url) is None


def test_the_daemon_outlives_what_is_away_and_drains_once(metadata: Metadata, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    ray = tmp_path / "bin" / "ray"  # stands for Ray's CLI, which fails at first
    ray.parent.mkdir()
    ray.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ntest $(wc -l < {calls}) -gt 1\n')
    ray.chmod(0o755)
    metadata.broken = True
    daemon = subprocess.Popen(
        [sys.executable, "cluster/spot_drain.py", "--cloud", "aws", "--url", metadata.url, "--every", "0.05",
         "--node-id", "abc"],
        cwd=REPOSITORY, env={**os.environ, "PATH": f"{ray.parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_ADDRESS": "10.0.0.1:6379"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(1)
    metadata.broken = False
    time.sleep(0.5)
    assert daemon.poll() is None
    assert not calls.exists()
    metadata.notice("aws", datetime.fromtimestamp(time.time() + 120, UTC))
    _, error = daemon.communicate(timeout=60)
    assert daemon.returncode == 0, error
    first, second = calls.read_text().splitlines()
    for call in (first, second):
        assert call.startswith("drain-node --address 10.0.0.1:6379 --node-id abc --reason DRAIN_NODE_REASON_PREEMPTION")
        assert 100 < int(call.split()[-1]) <= 120
