"""``eqm_dist/commands/sweep_stepsize.py`` as a script."""

from eqm_dist.commands.sweep_stepsize import start

if __name__ == "__main__":
    start()
