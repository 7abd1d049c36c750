"""Rows of the benchmark for the loop: acting, learning, other loops, scaling."""

import contextlib
import functools
import resource
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from aps_jax import config as config_lib
from experiments.benchmark import setup
from experiments.benchmark.setup import FRAME_SKIP, Size
from experiments.benchmark.table import (
    Row,
    Turns,
    at_least,
    at_most,
    only_on_gpu,
    take_turns,
)

# A fiftieth of what the temporaries of the updates of one iteration would cost if the
# allocator gave them back to the kernel: 7,000 pages of 4 KiB with the cpu preset.
_FEW_FAULTS = 140.0


def matrix_product(size: Size) -> tuple[Callable[[], None], float]:
    """Returns a product of matrices on the device, and its operations."""
    side = size.product_side
    matrix = jnp.ones((side, side), jnp.float32)
    product = jax.jit(
        functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    )
    return lambda: jax.block_until_ready(product(matrix, matrix)), 2.0 * side**3


def _loop_turns(config: config_lib.Config, size: Size, *, learns: bool) -> Turns:
    """Times the loop and its parts alone, in seconds per agent step."""
    session = setup.started(config)
    things = {
        "loop": lambda: session.play(size.iterations, learns=learns),
        "env": lambda: session.step_environments(size.iterations),
        "act": lambda: session.act(size.iterations),
    }
    work = dict.fromkeys(things, float(size.iterations * session.num_envs))
    if learns:
        things["learn"] = lambda: session.learn(size.updates)
        work["learn"] = size.updates / session.updates_per_step
        things["product"], flops = matrix_product(size)
        of_update = session.compiled_update().cost_analysis()["flops"]
        # Agent steps whose updates have as many operations.
        work["product"] = flops / of_update / session.updates_per_step
    return take_turns(things, repetitions=size.repetitions, work=work)


def acting_rows(size: Size) -> list[Row]:
    """Compares acting and storing with the environments alone."""
    turns = _loop_turns(setup.main_config(size), size, learns=False)
    raw = turns.ratio(lambda t: t["env"] / t["loop"])
    own = turns.ratio(lambda t: (t["env"] + t["act"]) / t["loop"])
    limit = 1.0 / (turns.median("env") + turns.median("act"))
    rate, unit, is_cpu = turns.rate("loop"), "agent steps/s", setup.is_cpu()
    goal = {"ratio": raw} if is_cpu else at_least(raw, 0.93)
    own_goal = at_least(own, 0.9) if is_cpu else {"ratio": own}
    return [
        Row(
            "acting", "acting loop / raw EnvPool", rate, turns.rate("env"), unit, **goal
        ),
        Row(
            "acting", "acting loop / 1 / (t_env + t_act)", rate, limit, unit, **own_goal
        ),
    ]


def full_rows(size: Size) -> list[Row]:
    """Compares pretraining with the limit from its parts, measured alone."""
    rows = []
    is_cpu = setup.is_cpu()
    configs = {"main preset": setup.main_config(size)}
    if is_cpu:
        configs["Nature encoder"] = setup.nature_config(size)

    def limit(t):
        if is_cpu:
            return t["env"] + t["act"] + t["learn"]
        return max(t["env"], t["learn"])

    for name, config in configs.items():
        turns = _loop_turns(config, size, learns=True)
        ratio = turns.ratio(lambda t: limit(t) / t["loop"])
        rows.append(
            Row(
                "full",
                f"{name}: pretraining / the limit from its parts",
                FRAME_SKIP * turns.rate("loop"),
                FRAME_SKIP / turns.ratio(limit),
                "frames/s",
                **at_least(ratio, 0.9 if is_cpu else 0.88),
            )
        )
        words = "an update's operations at the rate of a matrix product / it"
        shares = {words: ("learn", "product")}
        for part in ("env", "act", "learn"):
            shares[f"{part} alone, share of the loop's time"] = (part, "loop")
        for words, (part, whole) in shares.items():
            upper, lower = (whole, part) if whole == "product" else (part, whole)
            rows.append(
                Row(
                    "full",
                    f"{name}: {words}",
                    1e6 * turns.median(part),
                    1e6 * turns.median(whole),
                    "us/agent step",
                    ratio=turns.ratio(lambda t, u=upper, v=lower: t[u] / t[v]),
                )
            )
    return rows


def raw_rows(size: Size) -> list[Row]:
    """Compares pretraining as DQN replays with the environments alone."""
    config = setup.nature_config(size, samples_per_step=8.0)
    turns = _loop_turns(config, size, learns=True)
    row = Row(
        "raw",
        "Nature encoder, 8 samples per step: pretraining / raw EnvPool",
        FRAME_SKIP * turns.rate("loop"),
        FRAME_SKIP * turns.rate("env"),
        "frames/s",
        **at_least(turns.ratio(lambda t: t["env"] / t["loop"]), 0.8),
    )
    return [only_on_gpu(row)]


def others_rows(size: Size) -> list[Row]:
    """Compares with two other ways to write the same loop."""
    session = setup.started(setup.main_config(size))
    things = {
        "loop": lambda: session.play(size.iterations),
        "a loop without overlap": lambda: session.play_without_overlap(size.iterations),
        "EnvPool's XLA interface in one jitted scan": session.make_scan(
            size.iterations
        ),
    }
    work = dict.fromkeys(things, float(size.iterations * session.num_envs))
    turns = take_turns(things, repetitions=size.repetitions, work=work)
    rows = [
        Row(
            "others",
            f"ours / {name}",
            FRAME_SKIP * turns.rate("loop"),
            FRAME_SKIP * turns.rate(name),
            "frames/s",
            **at_least(turns.ratio(lambda t, n=name: t[n] / t["loop"]), goal),
        )
        for name, goal in zip(list(things)[1:], (1.4, 1.3), strict=True)
    ]
    # On a CPU no second device could learn while the cores emulate.
    return [only_on_gpu(rows[0]), rows[1]]


@contextlib.contextmanager
def _counted_compilations() -> Iterator[list[str]]:
    """Collects the compilations that happen inside."""
    events: list[str] = []
    is_open = True

    def listen(name: str, seconds: float, **_: Any) -> None:
        del seconds
        if is_open and name.endswith("backend_compile_duration"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        is_open = False


def recompilation_rows(size: Size) -> list[Row]:
    """Counts compilations and implicit transfers of the loop after warm-up."""
    session = setup.started(setup.main_config(size))
    # Everything that is compiled late has been compiled by then.
    session.play(min(size.long_iterations, 250))
    num_transfers, note = 0, ""
    with _counted_compilations() as events:
        try:
            with jax.transfer_guard("disallow"):
                session.play(size.long_iterations)
        except jax.errors.JaxRuntimeError as error:
            if "transfer" not in str(error):
                raise
            num_transfers, note = 1, str(error).splitlines()[0]
    counts = {"compilations": len(events), "implicit transfers": num_transfers}
    return [
        Row(
            "recompilation",
            f"{what} in {size.long_iterations:,} iterations of the loop",
            count,
            0,
            goal="0",
            is_met=count == 0,
            note=note if count else "",
        )
        for what, count in counts.items()
    ]


def page_faults_rows(size: Size) -> list[Row]:
    """Counts the pages that the kernel must hand out to the loop after warm-up."""
    session = setup.started(setup.main_config(size))
    session.play(size.iterations)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    session.play(size.iterations)
    count = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    faults = count / size.iterations
    goal = at_most(faults / _FEW_FAULTS, 1.0)
    case = "page faults per iteration of the loop"
    return [Row("page_faults", case, faults, _FEW_FAULTS, **goal)]


def scaling_rows(size: Size) -> list[Row]:
    """Measures acting at several numbers of environments, and the replay's memory."""
    config = setup.main_config(size)
    things, work = {}, {}
    with contextlib.ExitStack() as held:
        for num_envs in size.env_counts:
            options = {"num_envs": num_envs, "replay_size": num_envs * 40}
            session = held.enter_context(
                contextlib.closing(
                    setup.Setup(
                        config_lib.replace_options(config, **options), learns=False
                    )
                )
            )
            count = max(3, size.iterations * config.pretrain.num_envs // num_envs // 4)
            things[num_envs] = functools.partial(session.play, count, learns=False)
            work[num_envs] = float(count * num_envs)
        turns = take_turns(things, repetitions=size.repetitions, work=work)
    rows = []
    for fewer, num_envs in zip((None, *size.env_counts), size.env_counts):
        goal = {}
        if fewer:
            ratio = turns.ratio(lambda t, n=num_envs, f=fewer: t[f] / t[n])
            goal = {"limit": FRAME_SKIP * turns.rate(fewer), **at_least(ratio, 0.9)}
        case = f"acting loop, {num_envs} environments / the row above"
        rate = FRAME_SKIP * turns.rate(num_envs)
        rows.append(Row("scaling", case, rate, unit="frames/s", **goal))
    few, many = size.memory_steps
    taken = []
    for steps in (few, many):
        replay = setup.make_replay(num_envs=4, size=steps)
        analysis = jax.jit(replay.init).lower().compile().memory_analysis()
        taken.append(analysis.output_size_in_bytes + analysis.temp_size_in_bytes)
    limit = taken[0] * many / few
    case = f"memory of {many:,} steps of replay / {many // few} times {few:,}"
    goal = at_most(taken[1] / limit, 1.01)
    return [*rows, Row("scaling", case, taken[1], limit, "bytes", **goal)]
