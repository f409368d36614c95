"""Build a cluster of two to four hosts on this Linux machine, break it, and remove it (root only).

python -m cluster.lab up --hosts 3            a head and two workers; then submit jobs as to any cluster:
eval "$(python -m cluster.lab env)"           addresses and the token
ray job submit --working-dir . -- python pipelines/train.py --run.root /var/lib/eqm-lab/shared/runs
python -m cluster.lab kill-host worker-1      and the other faults below
python -m cluster.lab down                    removes everything
"""

from collections.abc import Callable, Sequence
from typing import Any

from cluster.lab import faults, lab, layout, network
from cluster.lab.lab import LabError
from eqm_dist import cli


def _up(hosts: int, restarts: bool) -> None:
    """build the lab"""
    lab.up(hosts, restarts)
    print(lab.status())


def _status() -> None:
    """show hosts and addresses"""
    print(lab.status())


def _env() -> None:
    """print what a submitter exports, for eval"""
    print("\n".join(f"export {name}='{value}'" for name, value in layout.submitter_environment().items()))


Argument = tuple[str, dict[str, Any]]
RANK: Argument = "rank", {"type": int, "help": "the rank whose process is meant"}
HOST: Argument = "host", {"choices": layout.ALL_HOSTS[1:], "help": "one of %(choices)s"}
DISK: Argument = "--host", {"choices": layout.ALL_HOSTS, "help": "a local disk; default: the shared file system"}

# What each verb calls, with what. The arguments are those of the function, whose docstring is the help.
VERBS: dict[str, tuple[Callable[..., None], Sequence[Argument]]] = {
    "up": (
        _up,
        [
            ("--hosts", {"type": int, "default": 3, "help": "2 to 4, the head among them (default: %(default)s)"}),
            ("--no-restarts", {"action": "store_false", "dest": "restarts", "help": "Ray stays dead when it dies"}),
        ],
    ),
    "down": (lab.down, []),
    "status": (_status, []),
    "env": (_env, []),
    "kill-rank": (faults.kill_rank, [RANK]),
    "kill-raylet": (faults.kill_raylet, [HOST]),
    "kill-driver": (faults.kill_driver, []),
    "kill-host": (faults.kill_host, [HOST]),
    "start-host": (faults.start_host, [HOST]),
    "cut": (faults.cut, [HOST]),
    "restore": (faults.restore, [HOST]),
    "freeze": (faults.freeze, [RANK]),
    "thaw": (faults.thaw, [RANK]),
    "throttle": (
        faults.throttle,
        [
            RANK,
            ("--share", {"type": float, "default": 0.2, "help": "of the time, from 0 to 1 (default: %(default)s)"}),
            ("--seconds", {"type": float, "default": 60.0, "help": "for how long (default: %(default)s)"}),
        ],
    ),
    "slow": (
        network.shape,
        [
            HOST,
            ("--rate-mbit", {"type": float, "help": "Mbit/s"}),
            ("--delay-ms", {"type": float, "help": "one way; needs a kernel with netem"}),
        ],
    ),
    "break-s3": (faults.break_s3, []),
    "freeze-s3": (faults.freeze_s3, []),
    "mend-s3": (faults.mend_s3, []),
    "fill-disk": (faults.fill_disk, [DISK]),
    "free-disk": (faults.free_disk, [DISK]),
}


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    parser = cli.command_parser(__doc__, prog="python -m cluster.lab")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    for name, (call, its_arguments) in VERBS.items():
        text = (call.__doc__ or "").splitlines()[0]
        verb = verbs.add_parser(name, help=text[0].lower() + text[1:].rstrip("."), description=text, allow_abbrev=False)
        for argument, settings in its_arguments:
            verb.add_argument(argument, **settings)
    values = vars(parser.parse_args(arguments))
    name = values.pop("verb")
    if name not in ("up", "down", "status", "env"):
        _check_there(name, values.get("host"))
    VERBS[name][0](**values)


def _check_there(verb: str, host: str | None) -> None:
    if not (there := network.connected()):
        raise LabError(f"{verb} needs the lab, which is down; `python -m cluster.lab up` builds it.")
    if host is not None and host not in there and verb != "start-host":
        raise LabError(f"{verb} needs a host of the lab, which are {', '.join(there)}, got {host}; start it first.")


if __name__ == "__main__":
    cli.run(main)
