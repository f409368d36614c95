"""``eqm_dist/commands/sweep_decay.py`` as a script."""

from eqm_dist.commands.sweep_decay import start

if __name__ == "__main__":
    start()
