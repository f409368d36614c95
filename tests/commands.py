"""All commands in this process: their parsers, for tests that hold for every flag, and a way to run one."""

import argparse
import contextlib
import importlib
import io
import logging
import sys
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from eqm_dist import cli
from eqm_dist.__main__ import COMMANDS
from eqm_dist.commands import prepare_shards
from tests.tiny import Outcome


def parsers() -> list[object]:
    """Name and parser of every command and of the commands below them, as parameters of a test."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name in COMMANDS:
        module = importlib.import_module(f"eqm_dist.commands.{name.replace('-', '_')}")
        if name == "prepare-shards":
            found |= {f"{name} {part}": module.make_parser(part) for part in prepare_shards.COMMANDS}
        else:
            found[name] = module.make_parser()
    return [pytest.param(name, parser, id=name) for name, parser in found.items()]


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[list[str], argparse.Action]]:
    """Every flag of a command, those of its own commands included, with what stands before it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from (([name, *before], flag) for before, flag in actions(below))
        elif not isinstance(action, argparse._HelpAction):
            yield [], action


def parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    return importlib.import_module(f"eqm_dist.commands.{name.replace('-', '_')}").make_parser()


def needed(parser: argparse.ArgumentParser) -> list[str]:
    """What a command line cannot be without."""
    found = [action for before, action in actions(parser) if not before]
    flags = [part for action in found if action.option_strings and action.required
             for part in (action.option_strings[0], "x")]  # fmt: skip
    return [*flags, *("x" for action in found if not action.option_strings)]


def with_text(parser: argparse.ArgumentParser, text: str) -> Iterator[list[str]]:
    """A command line for each flag and argument that takes any text: with this one there, and all that it needs."""
    found = list(actions(parser))
    places = [action.dest for before, action in found if not before and not action.option_strings]
    needed = [part for _, action in found if action.option_strings and action.required
              for part in (action.option_strings[0], "x")]  # fmt: skip
    for before, action in found:
        if action.nargs == 0 or action.type is not None or action.choices is not None:
            continue
        if action.option_strings:
            yield [*before, *needed, *(["x"] * len(places)), action.option_strings[0], text]
        else:
            yield [*before, *needed, *(text if place == action.dest else "x" for place in places or [action.dest])]


def run(name: str, *arguments: str) -> Outcome:
    """A command as its user runs it, but in this process."""
    package = logging.getLogger("eqm_dist")
    before = package.handlers, package.level, package.propagate
    package.handlers = []
    out, err = io.StringIO(), io.StringIO()
    main = importlib.import_module(f"eqm_dist.commands.{name.replace('-', '_')}").main
    try:
        with (
            patch.object(sys, "argv", [f"eqm-dist {name}", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.run(main)
    except SystemExit as end:
        code = end.code
    finally:
        package.handlers, package.level, package.propagate = before
    return Outcome(int(code or 0), out.getvalue(), err.getvalue())
