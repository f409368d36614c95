"""``eqm_dist/commands/denoise.py`` as a script."""

from eqm_dist.commands.denoise import start

if __name__ == "__main__":
    start()
