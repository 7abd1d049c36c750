r"""Rows of the benchmark for devices and particles, and the process that they start.

  XLA_FLAGS=--xla_force_host_platform_device_count=2 \
    python -m experiments.bench_scaling --preset=cpu --num_devices=2

is that process: it reads lines `THING CASE COUNT` and answers each when it has done so
many of the thing, which is `loop` (iterations) or `learn` (updates).
"""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import IO

import jax

from aps_jax import config as config_lib
from experiments import bench_loop, common_flags
from experiments.bench_table import Row, Turns, at_most, take_turns

# What stays the same when there are more devices.
CASES = {"global": "same global batch", "each": "same batch per device"}
_DONE = "done"
_SHARED_CORES = "virtual devices share the cores of this machine"
_STACK_BYTES = 84 * 84 * config_lib.STACK_SIZE


def config_of(case: str, config: config_lib.Config) -> config_lib.Config:
    """Returns the config of a case for the devices that a config names."""
    if case == "global":
        return config
    count = config.num_devices
    return config_lib.replace_options(
        config,
        num_envs=count * config.pretrain.num_envs,
        batch_size=count * config.learner.batch_size,
        num_particles=count * config.learner.num_particles,
        replay_size=count * config.pretrain.replay_size,
    )


def serve(config: config_lib.Config, requests: IO[str], answers: IO[str]) -> None:
    """Does what it is asked to, until there are no more requests."""
    for line in requests:
        thing, case, count = line.split()
        parts = bench_loop.started(config_of(case, config), bench_loop.FULL)
        if thing == "loop":
            bench_loop.play(parts, int(count), learns=True)
        else:
            bench_loop.learn_alone(parts, int(count))
        print(_DONE, file=answers, flush=True)


def main(argv: Sequence[str]) -> None:
    """Runs on as many devices as the flags say."""
    common_flags.reject_words(argv)
    serve(common_flags.config_from_flags(), sys.stdin, sys.stdout)
    bench_loop.close_sessions()


@contextlib.contextmanager
def process(num_devices: int, size: bench_loop.Size):
    """Starts a process with so many devices.

    Returns:
      `ask(thing, case, count)`, which returns when it has been done.
    """
    config = bench_loop.main_config(size)
    options = {"replay_size": 5_000, "warmup_agent_steps": 2_000, **dict(size.options)}
    command = [
        sys.executable,
        "-m",
        "experiments.bench_scaling",
        f"--preset={config.preset}",
        f"--num_devices={num_devices}",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    environment = dict(os.environ)
    if jax.default_backend() == "cpu":
        # No more than are used: XLA starts a thread for each of them.
        environment["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "")
            + f" --xla_force_host_platform_device_count={num_devices}"
        )
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as started:

        def ask(thing: str, case: str, count: int) -> None:
            started.stdin.write(f"{thing} {case} {count}\n")
            started.stdin.flush()
            answer = started.stdout.readline().strip()
            if answer != _DONE:
                raise RuntimeError(f"{' '.join(command)} ended: {answer!r}")

        yield ask


def devices_rows(size: bench_loop.Size) -> list[Row]:
    """Compares numbers of devices, each in a process of its own, in turn."""
    config = bench_loop.main_config(size)
    counts = size.device_counts
    if jax.default_backend() != "cpu":
        counts = tuple(n for n in counts if n <= len(jax.local_devices()))
    with contextlib.ExitStack() as held:
        asks = {n: held.enter_context(process(n, size)) for n in counts}
        things: dict[str, Callable[[], None]] = {}
        work = {}
        for case in CASES:
            for count, ask in asks.items():
                of_case = config_of(
                    case, config_lib.replace_options(config, num_devices=count)
                )
                # As many agent steps in a turn of each, but for rounding.
                iterations = size.iterations
                if case == "each":
                    iterations = max(size.iterations // count, min(10, iterations))
                for thing, number, units in (
                    ("loop", iterations, iterations * of_case.pretrain.num_envs),
                    ("learn", size.updates, size.updates),
                ):
                    name = f"{thing} {case} {count}"
                    things[name] = functools.partial(ask, thing, case, number)
                    work[name] = float(units)
        turns = take_turns(things, repetitions=size.repetitions, work=work)
    return table_of_devices(turns, counts)


def table_of_devices(turns: Turns, counts: Sequence[int]) -> list[Row]:
    """Makes the rows from seconds per agent step and per update; first is one device.

    All devices take part in each update, and each steps its own environments. The limit
    is what one device does with all the cores, divided by the number of devices: so the
    ratio is what all do together, by what one does.
    """
    rows = []
    for case, words in CASES.items():
        for count in counts:
            for thing, unit in (("loop", "agent steps/s"), ("learn", "updates/s")):
                one, many = f"{thing} {case} {counts[0]}", f"{thing} {case} {count}"
                # An update of so many times the batch is so many times the work.
                share = count if thing == "loop" or case == "each" else 1
                rate = turns.rate(many) / (count if thing == "loop" else 1)
                grown = count if (thing, case) == ("learn", "each") else 1
                rows.append(
                    Row(
                        "devices",
                        f"{words}, {thing}: each of {count} / its share of one alone",
                        rate,
                        turns.rate(one) / share,
                        unit,
                        ratio=turns.ratio(
                            lambda t, o=one, m=many, g=grown: g * t[o] / t[m]
                        ),
                    )
                )
    rows[0] = rows[0]._replace(note=_SHARED_CORES)
    return rows


def particles_rows(size: bench_loop.Size) -> list[Row]:
    """Measures an update, and its memory, at several numbers of particles."""
    config = bench_loop.main_config(size)
    things, stacks, memory = {}, {}, {}
    for count in size.particle_counts:
        parts = bench_loop.started(
            config_lib.replace_options(config, num_particles=count), size
        )
        session = parts.session
        compiled = parts.learn.lower(
            session.state, session.sums, session.memory.replay
        ).compile()
        memory[count] = compiled.memory_analysis().temp_size_in_bytes
        stacks[count] = count * _STACK_BYTES
        things[str(count)] = functools.partial(bench_loop.learn_alone, parts, 1)
    turns = take_turns(things, repetitions=size.repetitions)
    rows = []
    least = size.particle_counts[0]
    for count in size.particle_counts:
        is_last = count == size.particle_counts[-1]
        grown = (memory[count] - memory[least]) / stacks[count]
        rows += [
            Row(
                "particles",
                f"an update with {count:,} / with {least:,}",
                1e3 * turns.median(str(count)),
                1e3 * turns.median(str(least)),
                "ms",
                ratio=turns.ratio(lambda t, n=str(count): t[n] / t[str(least)]),
            ),
            Row(
                "particles",
                f"temporary memory with {count:,}, growth / stacks of so many",
                memory[count],
                stacks[count],
                "bytes",
                **(at_most(grown, 0.01) if is_last else {"ratio": grown}),
            ),
        ]
    return rows


if __name__ == "__main__":
    common_flags.run(main)
