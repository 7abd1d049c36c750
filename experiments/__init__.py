"""The scripts: each is a module of its own, run by `python -m experiments.NAME`."""

import gc
import os

# Where one of the three was closed, the next file to be opened would take its number,
# and get what libraries write to it.
for _number in range(3):
    try:
        os.fstat(_number)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)

# Imports and tracing make a million objects that stay. By Python's default every 700 of
# them start a collection, which together take an eighth of a start.
gc.set_threshold(200_000)
