"""``eqm_dist/commands/evaluate.py`` as a script."""

from eqm_dist.commands.evaluate import start

if __name__ == "__main__":
    start()
