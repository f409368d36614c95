"""``eqm_dist/commands/train.py`` as a script."""

from eqm_dist.commands.train import start

if __name__ == "__main__":
    start()
