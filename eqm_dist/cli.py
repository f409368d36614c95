"""What all commands share: flags from the config's own keys, errors as one sentence, true exit codes.

Every key of ``eqm_dist.config`` is a flag of the same name, so a flag, a line of a file and an axis of a sweep are
spelled alike. Values go through ``with_overrides`` like everything else (docs/decisions/0005).
"""

import argparse
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from eqm_dist.config import Config, TrackConfig
from eqm_dist.documents import from_yaml
from eqm_dist.errors import ConfigError, EqmDistError, Terminated
from eqm_dist.machine import settle_user
from eqm_dist.options import Layer, Option, given, layered, options, parse, read_yaml, suggestion
from eqm_dist.presets import PRESETS
from eqm_dist.redaction import RULE, holds_secret, redacted

PACKAGED = "eqm-dist"
"""The program that an installed package brings; a checkout has the scripts of pipelines/ and tuning/ besides."""


def program() -> str:
    """How the command was started: ``train.py`` or ``eqm-dist train``."""
    return Path(sys.argv[0]).name


def as_started(text: str) -> str:
    """A text that names scripts of a checkout, in the words of whoever runs ``eqm-dist`` and has no checkout."""
    if not program().startswith(f"{PACKAGED} "):
        return text
    return re.sub(
        r"(?:python\s+)?(?:pipelines|tuning)/(\w+)\.py", lambda found: f"{PACKAGED} {found[1].replace('_', '-')}", text
    )


TRACK = "track."


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return as_started(super().format_help())

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            raise ConfigError(
                f"{flag} is not an option (command line); {suggestion(flag, self._option_string_actions)}"
            )
        for flag, value in self._given(parsed):
            _check_text(flag, value)
        return parsed

    def _given(self, parsed: argparse.Namespace) -> list[tuple[str, str]]:
        """The texts on the command line, each with its flag."""
        flags = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        values = {name: value if isinstance(value, list) else [value] for name, value in vars(parsed).items()}
        return [
            (flags.get(name, name), text) for name, texts in values.items() for text in texts if isinstance(text, str)
        ]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}; see --help.")


def _check_text(flag: str, text: str) -> None:
    """Refuse what no command can take, whatever the flag.

    Raises:
        ConfigError: a URL with a secret, or bytes that are no text.
    """
    if holds_secret(text):
        raise ConfigError(f"{flag} {RULE}.")
    try:
        text.encode()
    except UnicodeEncodeError:  # how Python holds bytes of file names that are not UTF-8
        readable = os.fsencode(text).decode("utf-8", "backslashreplace")
        raise ConfigError(f"{flag} must be text in UTF-8, got {readable}; rename what it names.") from None


def command_parser(description: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser of a command's own flags: never abbreviated, and bad input is a ``ConfigError``.

    Args:
        description: for ``--help``, with its line breaks.
        settings: others of ``argparse.ArgumentParser``.
    """
    return _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **settings,
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows every key of the config; a command adds its own flags to it."""
    command = command_parser(
        description,
        usage="%(prog)s [--preset NAME] [--config FILE] [--SECTION.KEY VALUE ...]",  # the whole list is below
        epilog="Precedence: defaults < --preset < --config < flags. Running the same command again resumes the run.",
    )
    command.add_argument("--preset", choices=list(PRESETS), help="the named run to start from (default: digits)")
    command.add_argument(
        "--config", metavar="FILE", help="a YAML file of options; runs/NAME/config.yaml starts that run again"
    )
    command.add_argument(
        "--launcher", metavar="{ray,local}", dest="launch.launcher", help="short for --launch.launcher"
    )
    add_config_flags(command)
    return command


def add_config_flags(command: argparse.ArgumentParser, *prefixes: str, of_model: bool = False) -> None:
    """Make config keys flags of a command: those that start with one of the prefixes, by default all.

    Args:
        command: gets the flags.
        prefixes: of the keys.
        of_model: whether a model that is loaded has values of its own, which are then the defaults.
    """
    groups: dict[str, Any] = {}
    for option in options(Config):
        if prefixes and not option.key.startswith(prefixes):
            continue
        section = option.key.split(".")[0]
        if section not in groups:
            groups[section] = command.add_argument_group(section, Config.model_fields[section].annotation.__doc__)
        text = (option.help_of_model if of_model else option.help).replace("%", "%%")
        groups[section].add_argument(f"--{option.key}", metavar=option.type_name, help=text)


ROOT = "run.root"


def add_root_flag(command: argparse.ArgumentParser) -> None:
    """The flag that says where the user's own runs lie."""
    command.add_argument(
        f"--{ROOT}", metavar="DIR",
        help="directory of your own runs, whose configs are taken whole; of any other model's the model, the objective"
        " and the sampler (default: runs/ here)",
    )  # fmt: skip


def root_from(arguments: argparse.Namespace) -> str | None:
    """The directory of the user's own runs; None for the default."""
    return getattr(arguments, ROOT)


def add_model_flags(command: argparse.ArgumentParser, *prefixes: str) -> None:
    """The flags of commands that take a trained model: which one, and what it may be told, ``prefixes`` included."""
    command.add_argument(
        "--model", metavar="PATH",
        help="a run, a checkpoint, an export, or an official file of weights (default: the newest of your runs)",
    )  # fmt: skip
    add_root_flag(command)
    command.add_argument(
        "--autoencoder", metavar="NAME",
        help="the autoencoder that decodes latents, where the model does not say it: identity, a folder that diffusers"
        " wrote, or a hub id",
    )  # fmt: skip
    command.add_argument(
        "--config", metavar="FILE",
        help="a YAML file whose sampler section is used, such as best.yaml of a sweep or config.yaml of a run",
    )  # fmt: skip
    add_config_flags(
        command, "sampler.", "objective.kind", "objective.energy", "model.num_heads", *prefixes, of_model=True
    )


def add_work_flags(command: argparse.ArgumentParser, batch: int, seeds: str) -> None:
    """The flags of commands that compute with a model: ``--batch`` and ``--seed``, which is that of ``seeds``."""
    command.add_argument(
        "--batch", type=count, default=batch, metavar="N",
        help="number of images computed at once (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--seed", type=seed, default=0, metavar="N", help=f"seed of {seeds} (default: %(default)s)")


def add_search_flags(
    command: argparse.ArgumentParser, kind: str, searches: Sequence[str], trials: str, out: str
) -> None:
    """The flags of all sweeps: what is searched and how, for how long, and where the results go.

    Args:
        command: gets the flags.
        kind: of the sweep, which names its default space.
        searches: names of ``--search``, the default first.
        trials: what their number is of, and how many there are by default.
        out: the default directory.
    """
    command.add_argument(
        "--space", metavar="FILE",
        help=f"file of the search space, YAML or Python (default: eqm_dist/sweeps/{kind}/space.yaml)",
    )  # fmt: skip
    command.add_argument(
        "--search", choices=searches, default=searches[0],
        help="how points of the space are chosen (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--trials", type=count, metavar="N", help=f"number of {trials}")
    command.add_argument(
        "--hours", type=hours, metavar="H",
        help="nothing begins, and no training goes on, after H hours; the same command continues (default: no limit)",
    )  # fmt: skip
    command.add_argument("--out", metavar="DIR", help=f"directory for the results (default: {out})")
    command.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and compute nothing")


def add_actor_flags(command: argparse.ArgumentParser) -> None:
    """The flags of commands whose work is done by actors: where, and how many."""
    command.add_argument(
        "--launcher", choices=["ray", "local"], default="ray",
        help="ray: the cluster of RAY_ADDRESS, or a local one; local: this process alone (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--actors", type=count, metavar="N",
        help="largest number of processes that do the work (default: one per GPU, without GPUs one per core)",
    )  # fmt: skip


def check_actors(arguments: argparse.Namespace) -> None:
    """Refuse a number of actors where there are none.

    Raises:
        ConfigError: both are given.
    """
    if arguments.launcher == "local" and arguments.actors is not None:
        raise ConfigError("--actors has no effect with --launcher local, which is this process alone; leave it out.")


MOST = 1_000_000_000


def count(text: str) -> int:
    """A flag's value that is a number of things."""
    if not (found := _whole(text, MOST)):
        most = f" and at most {MOST:,}" if text.isdecimal() and text.strip("0") else ""
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1{most}, got {text[:50]}")
    return found


def seed(text: str) -> int:
    """A flag's value that is the seed of something random."""
    if (found := _whole(text, 2**63 - 1)) is None:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, got {text[:50]}")
    return found


def _whole(text: str, most: int) -> int | None:
    """A number of digits alone; None if it is another text or too large."""
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(most))
    return int(text) if digits and int(text) <= most else None


def hours(text: str) -> float:
    """A flag's value that is a length of time."""
    if not (found := non_negative(text)):
        raise argparse.ArgumentTypeError(f"must be a positive number of hours, got {text}")
    return found


def non_negative(text: str) -> float:
    """A flag's value that is a number of at least 0, such as a share of a GPU."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return found


def config_from(arguments: argparse.Namespace) -> Config:
    """The config that the preset, the file and the flags describe together.

    Raises:
        ConfigError: an unknown key or a wrong value, in the file or in a flag.
    """
    preset = arguments.preset or "digits"
    file = [(read_yaml(arguments.config, Config), arguments.config)] if arguments.config else []
    flags = overrides_from(arguments), "command line"
    return layered(Config, (given(PRESETS[preset]()), f"preset {preset}"), *file, flags)


def model_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``add_model_flags`` says of a model beside which one it is, as ``load`` takes it.

    Raises:
        ConfigError: the file of ``--config`` has no sampler.
    """
    return {
        "autoencoder": arguments.autoencoder,
        "overrides": model_overrides(arguments),
        "root": root_from(arguments),
    }


def model_overrides(arguments: argparse.Namespace) -> list[Layer]:
    """The config keys that change a trained model, by layers: the sampler of ``--config``, then the flags.

    Raises:
        ConfigError: the file has no sampler.
    """
    prefix = "sampler."
    sampler: dict[str, Any] = {}
    if arguments.config:
        sampler = {key: value for key, value in read_yaml(arguments.config, Config).items() if key.startswith(prefix)}
        if not sampler:
            raise ConfigError(
                f"--config must name a YAML file with a sampler section, and {arguments.config} has none;"
                " use best.yaml of a sweep or config.yaml of a run."
            )
    flags = {key: value for key, value in overrides_from(arguments).items() if not key.startswith((TRACK, ROOT))}
    return [(sampler, str(arguments.config)), (flags, "command line")]


def track_from(arguments: argparse.Namespace) -> TrackConfig:
    """Where flags say that a command on a trained model is recorded.

    Never the model's own config: a model of somebody else must not decide to which server credentials go.

    Raises:
        ConfigError: a wrong value.
    """
    flags = overrides_from(arguments)
    own = {key.removeprefix(TRACK): value for key, value in flags.items() if key.startswith(TRACK)}
    return parse(TrackConfig, own, "command line")


def overrides_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config keys that flags set."""
    found = ((option, getattr(arguments, option.key, None)) for option in options(Config))
    return {option.key: _value(option, text) for option, text in found if text is not None}


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a command and leave: 0 done, 2 the input is wrong, 130 interrupted, 143 terminated, 1 anything else."""
    settle_user()
    with _raised_when_terminated():
        _run(main)


def _run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be text that the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except EqmDistError as error:
        print(f"error: {as_started(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Terminated:
        print("terminated; run the same command again to resume.", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # one that nobody has turned into a sentence of its own
        what = f" of {error.filename}" if error.filename else ""
        print(f"error: The machine refused the use{what}: {redacted(error.strerror or str(error))}; check the disk, the"
              " mount and the permissions.", file=sys.stderr)  # fmt: skip
        sys.exit(1)
    except MemoryError:
        print("error: The memory of this machine is not enough; lower the sizes or the batch.", file=sys.stderr)
        sys.exit(1)
    except Exception:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


@contextmanager
def _raised_when_terminated() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is, so that locks, clusters and records are left as they should be."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _value(option: Option, text: str) -> Any:
    """A flag's text as a value: lists, mappings and null as in YAML, all else as text that the config converts."""
    if text == "null":
        return None
    # The name of a directory may begin with a bracket.
    if option.type_name == "STR" or not text.startswith(("[", "{")):
        return text
    try:
        return from_yaml(text)
    except ValueError:
        shape = "a list like [1,2]" if text.startswith("[") else "a mapping like {a: 1}"
        raise ConfigError(f"{option.key} must be {shape}, got {text} (command line).") from None
