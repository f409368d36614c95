"""``eqm_dist/commands/export.py`` as a script."""

from eqm_dist.commands.export import start

if __name__ == "__main__":
    start()
