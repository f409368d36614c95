"""``eqm_dist/commands/sample.py`` as a script."""

from eqm_dist.commands.sample import start

if __name__ == "__main__":
    start()
