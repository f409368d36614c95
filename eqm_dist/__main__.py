"""``eqm-dist COMMAND``, also ``python -m eqm_dist COMMAND``: the commands for whoever has the package alone.

A command's module is imported when it is chosen, and nothing else is: the list has to answer at once.
"""

import difflib
import sys
from importlib import import_module
from typing import NoReturn

from eqm_dist import __version__

COMMANDS = {
    "prepare-shards": "turn images into shards, which training reads",
    "train-classifier": "train a classifier whose features an FID compares",
    "plan": "say what a run on N GPUs takes: memory, days and money",
    "train": "train a model, or resume its training",
    "checkpoint": "list, verify, export and convert the checkpoints of a run",
    "sample": "draw images from a trained model",
    "evaluate": "measure images or a model: FID, KID, precision, recall",
    "export": "write a trained model as safetensors with a model card",
    "sweep-stepsize": "find step size, momentum and NFE for a trained model",
    "sweep-decay": "find c(gamma) and other options by many short trainings",
    "landscape": "show on the plane what Equilibrium Matching learns",
    "denoise": "restore partly noised images",
    "ood": "tell images of another kind from those that a model knows",
    "compose": "draw images of several classes at once",
}


def main() -> NoReturn:
    """Run the command that the first argument names.

    Raises:
        SystemExit: always; 0 done, 2 the input is wrong, 1 anything else, 130 interrupted, 143 terminated.
    """
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in COMMANDS:
        sys.argv = [f"eqm-dist {name}", *rest]
        import_module(f"eqm_dist.commands.{name.replace('-', '_')}").start()
    elif name in ("--help", "-h"):
        print(_help())
    elif name == "--version":
        print(f"eqm-dist {__version__}")
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else "see eqm-dist --help for all commands."
        print(f"error: {f'{name} is not a command' if name else 'A command must be given'}; {remedy}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _help() -> str:
    lines = "\n".join(f"  {name:<18}{text}" for name, text in COMMANDS.items())
    return (
        "usage: eqm-dist COMMAND [--FLAG VALUE ...]\n\nDistributed training of Equilibrium Matching models.\n\n"
        f"commands:\n{lines}\n\n"
        "eqm-dist COMMAND --help lists the flags of a command. eqm-dist --version prints the version.\n"
        "exit codes: 0 done; 2 your input is wrong; 1 anything else; 130 interrupted; 143 terminated"
    )


if __name__ == "__main__":
    main()
