"""The row of the benchmark for how long a new process takes to its first update."""

import math
import pathlib
import subprocess
import sys
import tempfile
import time

from aps_jax.envs.atari import FRAME_SKIP
from experiments.benchmark import setup
from experiments.benchmark.setup import Size
from experiments.benchmark.table import Row, Turns, at_least, at_most

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Cold, on two cores, and how much faster a start with compiled programs must be.
_COLD_SECONDS = 60.0
_SPEEDUP = 3.0


def _pretrain(size: Size, workdir: pathlib.Path, cache: str) -> float:
    """Pretrains in a process of its own to the first update; returns its seconds."""
    config = setup.main_config(size)
    pretrain, batch_size = config.pretrain, config.learner.batch_size
    iterations = batch_size / (pretrain.samples_per_step * pretrain.num_envs)
    steps = pretrain.warmup_agent_steps + math.ceil(iterations) * pretrain.num_envs
    options = {**dict(size.options), "replay_size": pretrain.replay_size}
    options |= {"pretrain_frames": FRAME_SKIP * steps, "checkpoint_replay": False}
    options |= {"compilation_cache": cache, "workdir": workdir}
    command = [sys.executable, "-m", "experiments.pretrain"]
    command += [f"--preset={config.preset}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    start = time.perf_counter()
    subprocess.run(command, cwd=_ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def startup_rows(size: Size) -> list[Row]:
    """Compares starts of new processes with and without compiled programs at hand."""
    seconds: dict[str, list[float]] = {"cold": [], "cached": []}
    for _ in range(size.starts):
        with tempfile.TemporaryDirectory() as folder:
            for name, measured in seconds.items():
                workdir = pathlib.Path(folder, name)
                measured.append(_pretrain(size, workdir, f"{folder}/cache"))
    turns = Turns(seconds)
    cold, cached = turns.median("cold"), turns.median("cached")
    case = "cold start, one update and the end / a minute, on 2 cores"
    limit = at_most(cold / _COLD_SECONDS, 1.0)
    goal = at_least(turns.ratio(lambda t: t["cold"] / t["cached"]), _SPEEDUP)
    return [
        Row("startup", case, cold, _COLD_SECONDS, "s", **limit),
        Row("startup", "cold / with the compilation cache", cached, cold, "s", **goal),
    ]
