"""Where files live: local directories and s3:// prefixes alike, and how a file comes to be whole or not at all.

Shards, checkpoints and reports share it, so it knows of none of them.
"""
