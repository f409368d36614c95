"""The commands: one module each, which ``eqm-dist NAME`` and the scripts in pipelines/ and tuning/ run."""
