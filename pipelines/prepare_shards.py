"""``eqm_dist/commands/prepare_shards.py`` as a script."""

from eqm_dist.commands.prepare_shards import start

if __name__ == "__main__":
    start()
