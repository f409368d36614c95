"""``eqm_dist/commands/train_classifier.py`` as a script."""

from eqm_dist.commands.train_classifier import start

if __name__ == "__main__":
    start()
