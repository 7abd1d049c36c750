r"""Rows of the benchmark for start-up, and the process that they start.

  python -m experiments.bench_startup [--preset=cpu]

prints the seconds from the start of its process to the end of its first update.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import jax

from aps_jax.train import loop
from experiments import bench_loop, common_flags
from experiments.bench_table import Row, at_least

_PREFIX = "seconds to the first update: "
# Cold, on two cores, and how much faster a start with compiled programs must be.
_COLD_SECONDS = 60.0
_SPEEDUP = 3.0


def main(argv: Sequence[str]) -> None:
    """Starts pretraining as `experiments.pretrain` does, up to its first update."""
    common_flags.reject_words(argv)
    config = common_flags.config_from_flags()
    pool = loop.make_pool(config, config.pretrain.num_envs, loop.Stream.PRETRAIN_ACT)
    parts = loop.make_pretraining(config, pool)
    session = parts.session
    while not parts.schedule.num_due(session.agent_steps):
        session.step(parts.act, parts.learn, parts.schedule)
    jax.block_until_ready(session.state)
    print(f"{_PREFIX}{_seconds_since_start():.3f}")
    pool.close()


def _seconds_since_start() -> float:
    """Returns how long ago this process began, the interpreter's start included."""
    ticks = int(
        pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    )
    uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def measure(cache: str, options: Sequence[tuple[str, object]], preset: str) -> float:
    """Starts a process that keeps its compiled programs in a folder, and asks it.

    Raises:
      RuntimeError: The process failed; with the end of what it said.
    """
    command = [
        sys.executable,
        "-m",
        "experiments.bench_startup",
        f"--preset={preset}",
        f"--compilation_cache={cache}",
        *(f"--{name}={value}" for name, value in options),
    ]
    hidden = ("JAX_COMPILATION_CACHE_DIR",)  # Would win over the flag.
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith(_PREFIX):
            return float(line[len(_PREFIX) :])
    raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def startup_rows(size: bench_loop.Size) -> list[Row]:
    """Compares starts of new processes with and without compiled programs at hand."""
    preset = "cpu" if jax.default_backend() == "cpu" else "gpu"
    seconds: dict[str, list[float]] = {"cold": [], "cached": []}
    for _ in range(size.starts):
        with tempfile.TemporaryDirectory() as cache:
            seconds["cold"].append(measure(cache, size.options, preset))
            seconds["cached"].append(measure(cache, size.options, preset))
    cold = statistics.median(seconds["cold"])
    cached = statistics.median(seconds["cached"])
    ratio = statistics.median(
        a / b for a, b in zip(seconds["cold"], seconds["cached"], strict=True)
    )
    return [
        Row(
            "startup",
            "cold start to the first update",
            cold,
            _COLD_SECONDS,
            "s",
            ratio=cold / _COLD_SECONDS,
            goal="at most 60 s on 2 cores",
            is_met=cold <= _COLD_SECONDS,
        ),
        Row(
            "startup",
            "cold / with the compilation cache",
            cached,
            cold,
            "s",
            **at_least(ratio, _SPEEDUP),
        ),
    ]


if __name__ == "__main__":
    common_flags.run(main)
