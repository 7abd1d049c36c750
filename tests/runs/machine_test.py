"""Tests of aps_jax.runs.machine: what the allocator keeps, and users without a home."""

import json
import pathlib

from scripts import run_python

from aps_jax.runs import machine

# 40 MiB is more than glibc ever keeps by itself: it gives blocks above 32 MiB back. 80
# MiB is more than it keeps for any thread whose arena is not the first.
_PROGRAM = """
import concurrent.futures
import json
import resource
import sys
import numpy as np
from aps_jax.runs import machine
if sys.argv[1] == "tuned":
    machine.tune_allocator()

def faults(mebibytes):
    size = mebibytes * 2**20
    np.full(size, 1, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.full(size, 1, np.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

with concurrent.futures.ThreadPoolExecutor(1) as executor:
    found = {
        f"{mebibytes} {place}": call(faults, mebibytes)
        for place, call in (
            ("thread", lambda *given: executor.submit(*given).result()),
            ("main", lambda function, size: function(size)),
        )
        for mebibytes in (40, 80)
    }
print(json.dumps(found))
"""


def test_what_an_update_frees_stays_with_the_process():
    plain, tuned = (
        json.loads(run_python("-c", _PROGRAM, word)) for word in ("plain", "tuned")
    )
    assert list(plain) == ["40 thread", "80 thread", "40 main", "80 main"]
    # Every page is touched: 10,240 of 4 KiB, or fewer of larger ones.
    assert all(faults > 10 for faults in plain.values()), plain
    assert all(faults < 5 for faults in tuned.values()), tuned


def test_the_heap_is_on_huge_pages_and_takes_no_memory_before_it_is_used():
    program = (
        "import numpy as np\n"
        "from aps_jax.runs import machine\n"
        "def kibibytes(name):\n"
        "    for line in open('/proc/self/smaps_rollup'):\n"
        "        if line.startswith(name + ':'):\n"
        "            return int(line.split()[1])\n"
        "before = kibibytes('Rss')\n"
        "machine.tune_allocator()\n"
        "print(kibibytes('Rss') - before)\n"
        "held = np.full(2**27, 1, np.uint8)\n"
        "print(kibibytes('AnonHugePages'))\n"
    )
    grown, huge = map(int, run_python("-c", program).split())
    assert grown < 8 * 1024
    setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    has_any = setting.exists() and "[never]" not in setting.read_text()
    # 128 MiB, but for the pieces at both ends.
    assert huge >= (120 * 1024 if has_any else 0)


def test_a_process_without_room_for_a_larger_heap_goes_on():
    program = (
        "import resource\n"
        "from aps_jax.runs import machine\n"
        "import numpy as np\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "limit = used + 2**29\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "machine.tune_allocator()\n"
        "print(np.full(2**20, 1, np.uint8).sum())\n"
    )
    assert run_python("-c", program) == "1048576\n"


def test_without_a_home_folder_nothing_is_cached(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    assert machine.cache_folder() is None
    assert "no home folder" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert machine.cache_folder().parent == pathlib.Path("/cache/aps_jax")
