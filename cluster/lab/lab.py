"""The lab as a whole: up, down, and who is there."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.lab import layout, network
from eqm_dist.errors import LaunchError, UserError

START_DEADLINE_S = 300
"""For Ray, MLflow and S3 to answer; a busy machine takes long."""
SHARED_SIZE = "2g"


class LabError(UserError):
    """The lab cannot be what was asked for."""


def unavailable() -> str | None:
    """Why there can be no lab on this machine, or None."""
    if sys.platform != "linux":
        return f"The lab needs Linux for its network namespaces, and this is {sys.platform}."
    if os.geteuid() != 0:
        return "The lab needs root, to make network namespaces; run it with sudo, or in a privileged container."
    if missing := [program for program in ("ip", "tc", "unshare", "nsenter", "mount") if not shutil.which(program)]:
        return f"The lab needs the programs of iproute2 and util-linux, and there is no {missing[0]}; install them."
    probe = [
        "unshare",
        "--net",
        "--pid",
        "--mount",
        "--uts",
        "--fork",
        "--mount-proc",
        "ip",
        "link",
        "add",
        "type",
        "bridge",
    ]
    if (tried := subprocess.run(probe, capture_output=True, text=True, check=False)).returncode:
        return f"The lab needs namespaces and a bridge, which this kernel or container refuses: {tried.stderr.strip()}."
    return None


def up(hosts: int, restarts: bool = True) -> None:
    """Build the lab and wait until all of it answers.

    Args:
        hosts: a head, and others with a Ray worker of one CPU each.
        restarts: whether a host starts its Ray processes again when they die, as Kubernetes or systemd would.

    Raises:
        LabError: it is up already, or cannot be on this machine.
        LaunchError: it did not come up; nothing of it is left.
    """
    if not 2 <= hosts <= len(layout.ALL_HOSTS):
        raise LabError(f"--hosts must be from 2 to {len(layout.ALL_HOSTS)}, the head among them, got {hosts}.")
    if reason := unavailable():
        raise LabError(reason)
    if there := network.connected():
        raise LabError(f"The lab is up already, with {', '.join(there)}; `python -m cluster.lab down` removes it.")
    down()  # what a crash may have left
    try:
        _make_places()
        network.lay_bridge()
        for host in layout.ALL_HOSTS[:hosts]:
            start_host(host, restarts)
        wait_until(lambda: set(ray_hosts()) == set(network.connected()), "Ray to see all hosts")
        wait_until(lambda: _answers(f"{layout.MLFLOW}/health"), "MLflow to answer")
        wait_until(lambda: _answers(f"{layout.S3}/{layout.BUCKET}", method="PUT"), "S3 to answer")
    except BaseException:
        kept = _keep_logs()
        down()
        print(f"The logs of the hosts are in {kept}.", file=sys.stderr)
        raise


def down() -> None:
    """Remove all of the lab, also what a crash left of it."""
    for host in network.connected():
        kill_all(host)
    network.remove()
    while _is_mounted(layout.SHARED):
        subprocess.run(["umount", "--lazy", layout.SHARED], check=True)
    shutil.rmtree(layout.ROOT, ignore_errors=True)


def start_host(host: str, restarts: bool = True) -> None:
    """Switch a host on; it joins the cluster by itself."""
    if host not in network.connected():
        network.connect(host)
    outlives_us = ["setsid", "--fork"]
    enter_network = ["nsenter", f"--net=/run/netns/{layout.namespace(host)}"]
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc"]
    init = [sys.executable, "-m", "cluster.lab.host", host, "restarts" if restarts else "stays-dead"]
    with (layout.LOGS / f"{host}.log").open("ab") as log:
        subprocess.run(
            [*outlives_us, *enter_network, *unshare, *init], cwd=Path(__file__).parents[2], stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip


def remove_host(host: str) -> None:
    """Switch a host off and forget it."""
    kill_all(host)
    network.disconnect(host)


def pids(host: str) -> list[int]:
    """All processes of a host, as the machine numbers them."""
    return [int(pid) for pid in network.ip("netns", "pids", layout.namespace(host)).split()]


def kill_all(host: str) -> None:
    """kill -9 of everything on a host; returns when it is gone."""
    while left := pids(host):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def init_pid(host: str) -> int | None:
    """The first process of a host that is on."""
    for pid in pids(host):
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            if any(line.startswith("NSpid:") and line.split()[2:] == ["1"] for line in status.splitlines()):
                return pid
    return None


def disk(host: str) -> Path:
    """The local disk of a host, seen from the machine."""
    return Path(f"/proc/{init_pid(host)}/root{layout.DISK}")


def ray_hosts() -> list[str]:
    """The hosts that Ray takes for alive; none while its head does not answer."""
    with suppress(OSError, ValueError):
        summary = _get_json(f"{layout.DASHBOARD}/nodes?view=summary")["data"]["summary"]
        # A node that has only just come has no address yet.
        alive = {node.get("ip") for node in summary if node["raylet"].get("state") == "ALIVE"}
        return [host for host in layout.ALL_HOSTS if layout.address(host) in alive]
    return []


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = START_DEADLINE_S) -> None:
    """Poll until ``condition`` holds.

    Raises:
        LaunchError: it did not within ``deadline_s``.
    """
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise LaunchError(f"The lab waited {deadline_s:.0f} s for {what}, in vain.")
        time.sleep(0.5)


def status() -> str:
    """A line for every host, and where the servers are."""
    hosts = network.connected()
    if not hosts:
        return "The lab is down; `python -m cluster.lab up` builds it."
    alive, lines = ray_hosts(), []
    for host in hosts:
        facts = [
            "on" if init_pid(host) else "off",
            "in Ray" if host in alive else "not in Ray",
            *([] if network.is_plugged(host) else ["cut off"]),
        ]
        lines.append(f"{host:<9} {layout.address(host):<10} {', '.join(facts)}")
    servers = {"dashboard": layout.DASHBOARD, "MLflow": layout.MLFLOW, "S3": f"{layout.S3}, s3://{layout.BUCKET}"}
    lines += [f"{name:<9} {place}" for name, place in servers.items()]
    lines += [f"{'shared':<9} {layout.SHARED}", f"{'logs':<9} {layout.LOGS}"]
    return "\n".join(lines)


def _make_places() -> None:
    layout.ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)  # what hosts write is nobody else's on this machine
    for place in (layout.SHARED, layout.DISK, layout.LOGS):
        place.mkdir(parents=True, exist_ok=True)
    if not _is_mounted(layout.SHARED):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SHARED_SIZE}", "eqm-lab", layout.SHARED], check=True)
    layout.TOKEN.touch(mode=0o600)  # first, for it must never be there for others to read
    layout.TOKEN.write_text(secrets.token_hex(32))
    names = [f"{layout.address(host)} {host}" for host in layout.ALL_HOSTS]
    layout.HOSTS_FILE.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))


def _is_mounted(place: Path) -> bool:
    return any(line.split()[1] == str(place) for line in Path("/proc/mounts").read_text().splitlines())


def _keep_logs() -> Path:
    kept = Path(tempfile.mkdtemp(prefix="eqm-lab-logs-"))
    shutil.copytree(layout.LOGS, kept, dirs_exist_ok=True)
    return kept


def _get_json(url: str) -> Any:
    headers = {"Authorization": f"Bearer {layout.TOKEN.read_text()}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:  # noqa: S310
        return json.load(answer)


def _answers(url: str, method: str = "GET") -> bool:
    with suppress(OSError):
        urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5).close()  # noqa: S310
        return True
    return False
