"""``eqm_dist/commands/plan.py`` as a script."""

from eqm_dist.commands.plan import start

if __name__ == "__main__":
    start()
