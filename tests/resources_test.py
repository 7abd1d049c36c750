"""Tests of aps_jax.resources: what the allocator keeps."""

import subprocess
import sys

# 40 MiB is more than glibc ever keeps by itself: it gives blocks above 32 MiB back.
_PROGRAM = """
import resource
import numpy as np
from aps_jax import resources
if {is_tuned}:
    resources.tune_allocator()
size = 40 * 2**20
np.full(size, 1, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.full(size, 1, np.uint8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def test_what_an_update_frees_stays_with_the_process():
    def faults(is_tuned):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM.format(is_tuned=is_tuned)],
            capture_output=True,
            check=True,
            text=True,
        )
        return float(done.stdout)

    # Every page is touched: 10,240 of 4 KiB, fewer where the kernel hands out larger ones.
    assert faults(is_tuned=False) > 10
    assert faults(is_tuned=True) < 5
