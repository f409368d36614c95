"""``eqm_dist/commands/compose.py`` as a script."""

from eqm_dist.commands.compose import start

if __name__ == "__main__":
    start()
