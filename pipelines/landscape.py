"""``eqm_dist/commands/landscape.py`` as a script."""

from eqm_dist.commands.landscape import start

if __name__ == "__main__":
    start()
