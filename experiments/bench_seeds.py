r"""Row of the benchmark for many seeds, and the processes that it starts.

  python -m experiments.bench_seeds --bench_seeds=2 [--preset=cpu]

pretrains that many seeds at once, and for each line that it reads plays a turn and prints
what it took.
"""

import contextlib
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from absl import flags

from aps_jax import config as config_lib
from aps_jax.train import loop, seeds
from experiments import bench_loop, common_flags
from experiments.bench_table import Row

_ROOT = pathlib.Path(__file__).parents[1]
_READY = "ready"

_BENCH_SEEDS = flags.DEFINE_integer(
    "bench_seeds", 0, "Seeds that this process pretrains at once; 0 is a single run."
)
_BENCH_ITERATIONS = flags.DEFINE_integer(
    "bench_iterations", 60, "Iterations of the loop in one turn."
)


def start(config: config_lib.Config, num_seeds: int) -> loop.Pretraining:
    """Returns a session of pretraining that has warmed up, compiled and learned.

    Args:
      config: The run's values.
      num_seeds: Seeds at once; 0 makes a session of one run, without a seed axis.
    """
    run_seeds = range(config.seed, config.seed + num_seeds)
    pool = loop.make_pool(
        config,
        config.pretrain.num_envs,
        loop.Stream.PRETRAIN_ACT,
        run_seeds=run_seeds,
    )
    if num_seeds:
        parts = seeds.make_pretraining(config, run_seeds, pool)
    else:
        parts = loop.make_pretraining(config, pool)
    session = parts.session
    while session.agent_steps <= parts.schedule.start:
        session.step(parts.act)
    while not int(jax.device_get(session.state.num_updates).max()):
        session.step(parts.act, parts.learn, parts.schedule)
    return parts


def play(parts: loop.Pretraining, iterations: int) -> float:
    """Plays, learns and waits for all of it; returns the seconds."""
    started = time.perf_counter()
    bench_loop.play(parts, iterations, learns=True)
    return time.perf_counter() - started


def main(argv: Sequence[str]) -> None:
    """Plays a turn for every line of the standard input."""
    common_flags.reject_words(argv)
    parts = start(common_flags.config_from_flags(), _BENCH_SEEDS.value)
    print(_READY, flush=True)
    for _ in sys.stdin:
        print(play(parts, _BENCH_ITERATIONS.value), flush=True)


class _Player:
    """A process that plays turns."""

    def __init__(self, options: Sequence[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.bench_seeds", *options],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self) -> None:
        """Lets it play a turn."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        """Waits for what it says next.

        Raises:
          RuntimeError: It ended.
        """
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("A process of the row `seeds` ended before its turn.")
        return line

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def _players(options: Sequence[Sequence[str]]) -> Iterator[list[_Player]]:
    """Starts processes, one after another so that they compile once, and ends them."""
    with contextlib.ExitStack() as held:
        players = []
        for some in options:
            player = _Player(some)
            held.callback(player.close)
            if player.answer() != _READY:
                raise RuntimeError("A process of the row `seeds` did not start.")
            players.append(player)
        yield players


def turn(players: Sequence[_Player]) -> float:
    """Lets processes play a turn side by side; returns the seconds of the slowest."""
    for player in players:
        player.begin()
    return max(float(player.answer()) for player in players)


def seeds_rows(size: bench_loop.Size) -> list[Row]:
    """Compares S seeds at once with S processes side by side, and one after another."""
    config = bench_loop.main_config(size)
    preset = "cpu" if jax.default_backend() == "cpu" else "gpu"
    options = [
        f"--preset={preset}",
        f"--bench_iterations={size.iterations}",
        f"--replay_size={config.pretrain.replay_size}",
        *(f"--{k}={v}" for k, v in size.options if k != "replay_size"),
    ]
    rows = []
    for count in size.seed_counts:
        alone = [[*options, f"--seed={seed}"] for seed in range(count)]
        at_once = [*options, f"--bench_seeds={count}"]
        with _players([at_once, *alone]) as (one, *many):
            seconds: dict[str, list[float]] = {
                "at once": [],
                "side by side": [],
                "one after another": [],
            }
            for repetition in range(size.repetitions + 1):
                turns = {
                    "at once": turn([one]),
                    "side by side": turn(many),
                    "one after another": sum(turn([player]) for player in many),
                }
                if repetition:  # The first turn of each is not timed.
                    for name, value in turns.items():
                        seconds[name].append(value)
        steps = count * size.iterations * config.pretrain.num_envs
        rate = steps / statistics.median(seconds["at once"])
        for name in ("side by side", "one after another"):
            ratio = statistics.median(
                other / own
                for own, other in zip(seconds["at once"], seconds[name], strict=True)
            )
            rows.append(
                Row(
                    "seeds",
                    f"{count} seeds at once / {count} processes {name}",
                    rate,
                    steps / statistics.median(seconds[name]),
                    "agent steps/s",
                    ratio=ratio,
                    note="processes share the cores" if name == "side by side" else "",
                )
            )
    return rows


if __name__ == "__main__":
    common_flags.run(main)
