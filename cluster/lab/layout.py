"""What everything in the lab agrees on: its hosts, their addresses, and where its files lie."""

import os
import sys
from pathlib import Path

ROOT = Path("/var/lib/eqm-lab")
SHARED = ROOT / "shared"
"""The network file system of the lab: all hosts see the same files."""
DISK = ROOT / "disk"
"""The local disk: every host sees its own."""
LOGS = ROOT / "logs"
TOKEN = ROOT / "token"
HOSTS_FILE = ROOT / "hosts"
S3_FAILS = ROOT / "s3-fails"
"""While this file exists, the S3 endpoint answers every request with a 500."""

HEAD = "head"

BRIDGE = "eqm-lab"
INTERFACE = "eth0"
OUTSIDE = "10.77.0.254"
"""The address of the machine itself on the lab's network."""
RAY_PORT, DASHBOARD_PORT, MLFLOW_PORT, S3_PORT = 6379, 8265, 5000, 9000
BUCKET = "lab"

# How fast Ray gives up a host that has fallen silent: three times five seconds, where its defaults add up to a minute.
RAY_HEALTH_CHECK = {
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


def worker(number: int) -> str:
    """The name of a worker host; numbers start at 1."""
    return f"worker-{number}"


ALL_HOSTS = (HEAD, *(worker(number) for number in range(1, 4)))


def address(host: str) -> str:
    """The address of a host on the lab's network."""
    return f"10.77.0.{ALL_HOSTS.index(host) + 1}"


def namespace(host: str) -> str:
    """The name of a host's network namespace."""
    return f"eqm-lab-{host}"


def port(host: str) -> str:
    """The name of the machine's end of a host's cable."""
    return f"eqm-{host}"


DASHBOARD = f"http://{address(HEAD)}:{DASHBOARD_PORT}"
MLFLOW = f"http://{address(HEAD)}:{MLFLOW_PORT}"
S3 = f"http://{address(HEAD)}:{S3_PORT}"


def submitter_environment() -> dict[str, str]:
    """What a user of the lab exports, on the machine itself."""
    return {
        "RAY_API_SERVER_ADDRESS": DASHBOARD,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(TOKEN),
        "MLFLOW_TRACKING_URI": MLFLOW,
        "AWS_ENDPOINT_URL": S3,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "lab",
        "AWS_SECRET_ACCESS_KEY": "lab",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def host_environment(host: str) -> dict[str, str]:
    """The environment of everything that runs on a host."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    submitter = submitter_environment()
    return kept | submitter | RAY_HEALTH_CHECK | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "HOSTNAME": host,
        "RAY_TMPDIR": str(DISK),
        "TMPDIR": str(DISK),
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen processes that nobody here asks anything
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
