"""``eqm_dist/commands/ood.py`` as a script."""

from eqm_dist.commands.ood import start

if __name__ == "__main__":
    start()
