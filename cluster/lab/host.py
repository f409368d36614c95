"""The first process of a host: it makes the host's private places, starts its services and restarts what dies.

It is process 1 of a PID namespace, so everything on the host ends with it, as everything ends with a real host.
"""

import os
import subprocess
import sys
import time

from cluster.lab import layout

RESTART_PAUSE_S = 2.0
DISK_SIZE = "1g"
"""Of the local disk and of the shared memory of a host."""


def main(host: str, restarts: bool) -> None:
    """Run a host for ever."""
    _make_private_places(host)
    running = {name: _start(host, name, command) for name, command in services(host).items()}
    while True:
        ended, _ = os.wait()  # also of orphans, which process 1 inherits
        for name, process in running.items():
            if process.pid == ended and restarts:
                time.sleep(RESTART_PAUSE_S)
                running[name] = _start(host, name, services(host)[name])


def _make_private_places(host: str) -> None:
    subprocess.run(["hostname", host], check=True)
    subprocess.run(["mount", "--bind", layout.HOSTS_FILE, "/etc/hosts"], check=True)
    for place in (layout.DISK, "/dev/shm"):  # noqa: S108 (the host's own)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "eqm-lab", place], check=True)


def services(host: str) -> dict[str, list[str]]:
    """Name and command of everything that a host serves."""
    here = layout.address(host)
    ray = ["ray", "start", "--block", "--node-ip-address", here, "--num-gpus", "0", "--disable-usage-stats",
           "--object-store-memory", str(100 * 2**20)]  # fmt: skip
    if host != layout.HEAD:
        return {"raylet": [*ray, "--address", f"{layout.address(layout.HEAD)}:{layout.RAY_PORT}", "--num-cpus", "1"]}
    names = f"{layout.HEAD}:{layout.MLFLOW_PORT},{here}:{layout.MLFLOW_PORT}"
    return {
        "ray": [*ray, "--head", "--port", str(layout.RAY_PORT), "--num-cpus", "0",
                "--dashboard-host", here, "--dashboard-port", str(layout.DASHBOARD_PORT)],
        "mlflow": ["mlflow", "server", "--host", here, "--port", str(layout.MLFLOW_PORT), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{layout.DISK}/mlflow.db", "--allowed-hosts", names,
                   "--artifacts-destination", f"{layout.DISK}/mlflow-artifacts"],
        "s3": [sys.executable, "-m", "cluster.lab.s3"],
    }  # fmt: skip


def _start(host: str, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    with (layout.LOGS / f"{host}-{name}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=layout.host_environment(host), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


if __name__ == "__main__":
    main(sys.argv[1], restarts=sys.argv[2] == "restarts")
