"""``eqm_dist/commands/checkpoint.py`` as a script."""

from eqm_dist.commands.checkpoint import start

if __name__ == "__main__":
    start()
