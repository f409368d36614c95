"""Tell Ray when the cloud is about to take this machine away, so that runs save in time and go on elsewhere.

python cluster/spot_drain.py --cloud aws      beside the raylet of every node that may be taken away; needs Ray's CLI

Polls the cloud's metadata service. A notice becomes ``ray drain-node`` for the node on this machine, with the time
that is left: nothing new is placed there, and a training on it saves at once (docs/elastic.md). Ends after that.
Imports the standard library alone. RAY_ADDRESS says which cluster, and where authentication is on, RAY_AUTH_MODE and
the token are found as by every client of Ray.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime

logger = logging.getLogger("spot_drain")

_TIMEOUT_S = 2
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the service is on this machine's own link
_GCP_NOTICE_S = 30
_LONGEST_NOTICE_S = 900
"""Of Azure. Where this machine's clock is behind the cloud's, a notice seems longer than any is."""

_NODE_ID = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().get_node_id())
"""


def aws(url: str) -> float | None:
    """When EC2 takes the machine away, in seconds since the epoch; None without a notice (IMDSv2 with a token)."""
    token = _ask(f"{url}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    answer = _ask(f"{url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    if answer is None:
        return None
    return datetime.fromisoformat(json.loads(answer)["time"]).timestamp()


def gcp(url: str) -> float | None:
    """The same of Compute Engine, which gives no time but half a minute."""
    answer = _ask(f"{url}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return time.time() + _GCP_NOTICE_S if answer == "TRUE" else None


def azure(url: str) -> float | None:
    """The same of Azure's scheduled events, of which a scale set sees those of all its machines."""
    header = {"Metadata": "true"}
    name = _ask(f"{url}/metadata/instance/compute/name?api-version=2021-02-01&format=text", header)
    events = json.loads(_ask(f"{url}/metadata/scheduledevents?api-version=2020-07-01", header) or "{}")
    times = [
        # An event that has begun has no time any more.
        parsedate_to_datetime(event["NotBefore"]).timestamp() if event["NotBefore"] else time.time()
        for event in events.get("Events", [])
        if event["EventType"] in ("Preempt", "Terminate", "Redeploy", "Reboot") and name in event["Resources"]
    ]
    return min(times, default=None)


CLOUDS: dict[str, tuple[Callable[[str], float | None], str]] = {
    "aws": (aws, "http://169.254.169.254"),
    "gcp": (gcp, "http://metadata.google.internal"),
    "azure": (azure, "http://169.254.169.254"),
}


def drain(address: str, node: str | None, deadline: float) -> None:
    """Drain a node, by default the one on this machine.

    Raises:
        subprocess.CalledProcessError: Ray did not do it.
    """
    if node is None:
        command = [sys.executable, "-c", _NODE_ID, address]
        node = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    left_s = max(1, min(round(deadline - time.time()), _LONGEST_NOTICE_S))
    logger.info("draining node %s, which has %d s left", node, left_s)
    subprocess.run(
        ["ray", "drain-node", "--address", address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
         "--reason-message", "the cloud takes the machine away", "--deadline-remaining-seconds", str(left_s)],
        check=True,
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Poll until there is a notice and Ray knows of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cloud", choices=list(CLOUDS), required=True)
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks (default: 2)")
    parser.add_argument("--node-id", metavar="ID", help="of the node to drain (default: the one on this machine)")
    parser.add_argument("--url", help="of the metadata service (default: the cloud's own)")
    options = parser.parse_args(arguments)
    notice, url = CLOUDS[options.cloud]
    address, silent = os.environ.get("RAY_ADDRESS", "auto"), False
    while True:
        try:
            deadline = notice(options.url or url)
            silent = False
            if deadline is not None:
                drain(address, options.node_id, deadline)
                return
        except (OSError, ValueError, KeyError, TypeError, subprocess.CalledProcessError) as error:
            # Neither a service that is away nor a Ray that is not yet there may end what has to be there in the end.
            if not silent:
                logger.warning("warning: %s: %s; trying again", type(error).__name__, error)
            silent = True
        time.sleep(options.every)


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """What the metadata service answers; None where it has nothing of the kind."""
    request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310
    try:
        with _OPENER.open(request, timeout=_TIMEOUT_S) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            return None
        raise


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    main(sys.argv[1:])
