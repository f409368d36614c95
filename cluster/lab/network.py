"""The lab's network: a bridge, and a cable from it to the network namespace of every host."""

import subprocess

from cluster.lab.layout import ALL_HOSTS, BRIDGE, INTERFACE, OUTSIDE, address, namespace, port
from eqm_dist.errors import LaunchError


def ip(*arguments: str) -> str:
    """``ip ARGUMENTS``; returns what it printed.

    Raises:
        LaunchError: it failed; its own words say why.
    """
    return _run("ip", *arguments)


def lay_bridge() -> None:
    """The switch between the hosts, at which the machine itself has an address too."""
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("addr", "add", f"{OUTSIDE}/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")


def connect(host: str) -> None:
    """Give a host its network namespace and its cable."""
    space = namespace(host)
    ip("netns", "add", space)
    ip("link", "add", port(host), "type", "veth", "peer", "name", INTERFACE, "netns", space)
    ip("link", "set", port(host), "master", BRIDGE, "up")
    ip("-n", space, "addr", "add", f"{address(host)}/24", "dev", INTERFACE)
    ip("-n", space, "link", "set", "lo", "up")
    ip("-n", space, "link", "set", INTERFACE, "up")


def disconnect(host: str) -> None:
    """Remove a host's network namespace, and its cable with it."""
    if port(host) in _links():  # a crash may have come before it
        ip("link", "delete", port(host))
    ip("netns", "delete", namespace(host))


def remove() -> None:
    """The bridge, and all namespaces with their cables, as far as there are any."""
    for host in connected():
        disconnect(host)
    if BRIDGE in _links():
        ip("link", "delete", BRIDGE)


def connected() -> list[str]:
    """The hosts that have a network namespace."""
    spaces = {line.split()[0] for line in ip("netns", "list").splitlines() if line.strip()}
    return [host for host in ALL_HOSTS if namespace(host) in spaces]


def is_plugged(host: str) -> bool:
    """Whether a host's cable is in."""
    return "UP" in ip("-o", "link", "show", port(host)).split("<")[1].split(">")[0].split(",")


def plug(host: str, into: bool = True) -> None:
    """Put a host's cable in, or pull it: the host itself sees a link without carrier, others see nothing at all."""
    ip("link", "set", port(host), "up" if into else "down")


def shape(host: str, rate_mbit: float | None = None, delay_ms: float | None = None) -> None:
    """Slow a host's cable down in both directions; without a rate and a delay it is as fast as ever.

    Raises:
        LaunchError: the kernel has no netem, which a delay needs.
    """
    here, there = ["tc"], ["ip", "netns", "exec", namespace(host), "tc"]
    for tc, device in ((here, port(host)), (there, INTERFACE)):
        if "qdisc noqueue" not in _run(*tc, "qdisc", "show", "dev", device, "root"):
            _run(*tc, "qdisc", "delete", "dev", device, "root")
        if delay_ms is not None:
            rate = ["rate", f"{rate_mbit}mbit"] if rate_mbit is not None else []
            _run(*tc, "qdisc", "add", "dev", device, "root", "netem", "delay", f"{delay_ms}ms", *rate)
        elif rate_mbit is not None:
            limits = ["rate", f"{rate_mbit}mbit", "burst", "64kb", "latency", "2s"]
            _run(*tc, "qdisc", "add", "dev", device, "root", "tbf", *limits)


def _links() -> set[str]:
    return {line.split(":")[1].strip().split("@")[0] for line in ip("-o", "link", "show").splitlines()}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(
            f"The lab needs root and network namespaces: `{' '.join(command)}` said {done.stderr.strip()!r}."
        )
    return done.stdout
