"""Rows of the benchmark that processes of their own measure, and these processes.

Such a process is the benchmark with `--serve`. It starts pretraining as
`experiments.pretrain` does and prints how many seconds after its start its first update
was done. Then it reads lines `THING CASE COUNT`, and answers each when it has done so
many of the thing: `play` (iterations) or `learn` (updates).
"""

import contextlib
import functools
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any

import jax

from aps_jax import config as config_lib
from aps_jax.agents import aps
from experiments.benchmark import setup
from experiments.benchmark.setup import Size
from experiments.benchmark.table import Row, Turns, at_least, at_most, take_turns

# What stays the same when there are more devices.
CASES = {"global": "same global batch", "each": "same batch per device"}
_DONE = "done"
_ROOT = pathlib.Path(__file__).resolve().parents[2]
# Cold, on two cores, and how much faster a start with compiled programs must be.
_COLD_SECONDS = 60.0
_SPEEDUP = 3.0


def config_of(case: str, config: config_lib.Config) -> config_lib.Config:
    """Returns the config of a case for the devices that a config names."""
    if case == "global":
        return config
    count, learner = config.num_devices, config.learner
    sizes = {"batch_size": learner.batch_size, "num_envs": config.pretrain.num_envs}
    sizes |= {"replay_size": config.pretrain.replay_size}
    if isinstance(learner, aps.Config):
        sizes["num_particles"] = learner.num_particles
    grown = {name: count * size for name, size in sizes.items()}
    return config_lib.replace_options(config, **grown)


def _seconds_since_start() -> float:
    """Returns how long ago this process began, the interpreter's start included."""
    after_name = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2]
    uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return uptime - int(after_name.split()[19]) / os.sysconf("SC_CLK_TCK")


def serve(
    config: config_lib.Config, num_seeds: int, requests: IO[str], answers: IO[str]
) -> None:
    """Starts, and does what it is asked to until there are no more requests."""

    @functools.cache
    def session_of(case: str) -> setup.Setup:
        return setup.Setup(config_of(case, config), num_seeds=num_seeds)

    session_of("global")
    print(f"{_seconds_since_start():.3f}", file=answers, flush=True)
    for line in requests:
        thing, case, count = line.split()
        getattr(session_of(case), thing)(int(count))
        print(_DONE, file=answers, flush=True)


class Worker:
    """A process that does what it is asked to."""

    def __init__(
        self, size: Size, num_seeds: int = 1, num_devices: int = 1, **options: Any
    ):
        """Starts it and waits for its first update.

        Args:
          size: Whose config it runs.
          num_seeds: Seeds that it pretrains at once.
          num_devices: Devices that it sees; on a CPU they are virtual.
          **options: Its flags, over those of the size.
        """
        config = setup.main_config(size)
        replay_size = config.pretrain.replay_size
        options = {"replay_size": replay_size, **dict(size.options), **options}
        environment = dict(os.environ)
        if "compilation_cache" in options:  # The variable would win over the flag.
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if setup.is_cpu() and num_devices > 1:
            # No more than are used: XLA starts a thread for each of them.
            count = f" --xla_force_host_platform_device_count={num_devices}"
            environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + count
        self._command = [
            *(sys.executable, "-m", "experiments.benchmark", f"--serve={num_seeds}"),
            *(f"--preset={config.preset}", f"--num_devices={num_devices}"),
            *(f"--{name}={value}" for name, value in options.items()),
        ]
        self._process = subprocess.Popen(
            self._command,
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self.seconds_to_first_update = float(self._answer())

    def _answer(self) -> str:
        line = self._answers.readline().strip()
        if not line:
            self.close()
            raise RuntimeError(f"{' '.join(self._command)} ended too early.")
        return line

    def begin(self, thing: str, count: int, case: str = "global") -> None:
        """Lets it do so many of a thing, `play` or `learn`."""
        print(thing, case, count, file=self._requests, flush=True)

    def wait(self) -> None:
        """Waits until it has done what it began; a `RuntimeError` if it ended."""
        if (answer := self._answer()) != _DONE:
            raise RuntimeError(f"{' '.join(self._command)} answered {answer!r}.")

    def do(self, thing: str, count: int, case: str = "global") -> None:
        """Lets it do so many of a thing, and waits."""
        self.begin(thing, count, case)
        self.wait()

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._process.wait()
        self._answers.close()


def startup_rows(size: Size) -> list[Row]:
    """Compares starts of new processes with and without compiled programs at hand."""
    seconds: dict[str, list[float]] = {"cold": [], "cached": []}
    for _ in range(size.starts):
        with tempfile.TemporaryDirectory() as cache:
            for measured in seconds.values():
                worker = Worker(size, compilation_cache=cache)
                measured.append(worker.seconds_to_first_update)
                worker.close()
    turns = Turns(seconds)
    cold, cached = turns.median("cold"), turns.median("cached")
    case = "cold start to the first update / a minute, on 2 cores"
    limit = at_most(cold / _COLD_SECONDS, 1.0)
    goal = at_least(turns.ratio(lambda t: t["cold"] / t["cached"]), _SPEEDUP)
    return [
        Row("startup", case, cold, _COLD_SECONDS, "s", **limit),
        Row("startup", "cold / with the compilation cache", cached, cold, "s", **goal),
    ]


def seeds_rows(size: Size) -> list[Row]:
    """Compares S seeds at once with S processes side by side, and one after another."""
    steps = size.iterations * setup.main_config(size).pretrain.num_envs
    rows = []
    for count in size.seed_counts:
        with contextlib.ExitStack() as held:
            options: list[dict[str, int]] = [{"seed": seed} for seed in range(count)]
            *many, one = (
                held.enter_context(contextlib.closing(Worker(size, **each)))
                for each in (*options, {"num_seeds": count})
            )

            def beside(many: list[Worker] = many) -> None:
                for worker in many:
                    worker.begin("play", size.iterations)
                for worker in many:
                    worker.wait()

            def in_turn(many: list[Worker] = many) -> None:
                for worker in many:
                    worker.do("play", size.iterations)

            things: dict[str, Callable[[], None]] = {
                "at once": functools.partial(one.do, "play", size.iterations),
                "side by side": beside,
                "one after another": in_turn,
            }
            work = dict.fromkeys(things, float(count * steps))
            turns = take_turns(things, repetitions=size.repetitions, work=work)
        for name, note in (
            ("side by side", "processes share the cores"),
            ("one after another", ""),
        ):
            case = f"{count} seeds at once / {count} processes {name}"
            row = turns.rates("seeds", case, "at once", name, "agent steps/s")
            rows.append(row._replace(note=note))
    return rows


def devices_rows(size: Size) -> list[Row]:
    """Compares numbers of devices, each in a process of its own, in turn."""
    config = setup.main_config(size)
    counts = size.device_counts
    if not setup.is_cpu():
        counts = tuple(n for n in counts if n <= len(jax.local_devices()))
    fewer = {} if size.options else {"replay_size": 5_000, "warmup_agent_steps": 2_000}
    things: dict[tuple[str, str, int], Callable[[], None]] = {}
    work: dict[tuple[str, str, int], float] = {}
    with contextlib.ExitStack() as held:
        workers: dict[int, Worker] = {}
        for count in counts:
            worker = Worker(size, num_devices=count, **fewer)
            workers[count] = held.enter_context(contextlib.closing(worker))
        for (count, worker), case in itertools.product(workers.items(), CASES):
            on_all = config_lib.replace_options(config, num_devices=count)
            num_envs = config_of(case, on_all).pretrain.num_envs
            # As many agent steps in a turn of each, but for rounding.
            iterations = size.iterations
            if case == "each":
                iterations = max(size.iterations // count, min(10, iterations))
            # An update of so many times the batch is so many times the work.
            units = size.updates * (count if case == "each" else 1)
            for thing, number, done in (
                ("play", iterations, iterations * num_envs),
                ("learn", size.updates, units),
            ):
                name = (thing, case, count)
                things[name] = functools.partial(worker.do, thing, number, case)
                work[name] = float(done)
        turns = take_turns(things, repetitions=size.repetitions, work=work)
    units_of = {"play": "agent steps/s", "learn": "updates of one device's size/s"}
    rows = [
        turns.rates(
            "devices",
            f"{name}, {thing}: {count} devices / one with all the cores",
            (thing, case, count),
            (thing, case, counts[0]),
            unit,
        )
        for case, name in CASES.items()
        for count in counts
        for thing, unit in units_of.items()
    ]
    return [rows[0]._replace(note="virtual devices share the cores"), *rows[1:]]
