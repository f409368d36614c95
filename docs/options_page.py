"""Write docs/options.md, the list of all options, from where they are declared: ``python docs/options_page.py``."""

import argparse
from itertools import groupby
from pathlib import Path

from eqm_dist.config import Config
from eqm_dist.options import REQUIRED, Option, options, shown

PAGE = Path(__file__).with_name("options.md")
HEAD = """# All options

Every option is a flag (`--train.steps 500`), a key in a YAML file (`train: {steps: 500}`) and, marked with *axis*, an
axis of `tuning/sweep_decay.py`. Its value comes from, in rising order: the default here, the record of a run that has
begun, `--preset`, `--config`, the flags. `config.yaml` in the run directory has the values in effect. An option marked
with *resumable* may be another one when a run is started again; any other one decides the numbers, and stays. One
marked with *place* says where something lies: a run that goes on does not remember it, so say it again.

An option that takes effect only with certain values of another says so, and is refused elsewhere. Choosing another
variant drops what an earlier source gave for the one before.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for section, found in groupby(options(Config), lambda option: option.key.rpartition(".")[0]):
        parts += ["", f"## {section}", "", "| option | type | default | what it is |", "|---|---|---|---|"]
        parts += [_row(option) for option in found]
    return "\n".join([*parts, ""])


def _row(option: Option) -> str:
    only, field = option.only, option.field
    default = field.default if only is None else only.default
    written = "" if default in (None, REQUIRED) or callable(default) or field.is_required() else f"`{shown(default)}`"
    facts = [str(field.description).replace("\n", " ")]
    facts += [f"Only with {only.needs}."] if only else []
    marks = [mark.__name__.lower() for mark in sorted(option.marks, key=lambda mark: mark.__name__)]
    kind = option.type_name.replace("|", " or ")
    facts += [f"*{', '.join(marks)}*"] if marks else []
    return f"| `{option.key}` | {kind} | {written} | {' '.join(facts)} |"


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
