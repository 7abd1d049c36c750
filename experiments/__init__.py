"""The scripts: each is a module of its own, run by `python -m experiments.NAME`."""

import gc

# Imports and tracing make a million objects that stay. By Python's default every 700 of
# them start a collection, which together take an eighth of a start.
gc.set_threshold(200_000)
