"""Preflight: whether a machine can do a run, and how long that will take.

A stage checks the same at every start, but for the measured rate.
"""

import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import rich.table

from aps_jax import config as config_lib
from aps_jax.envs import games
from aps_jax.parallel import devices, processes
from aps_jax.runs import console, folders, machine
from aps_jax.train import loop, recorders, stages

MOST_ACTIONS = 18  # of any Atari game
_STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}


class Check(NamedTuple):
    """One line of the table."""

    name: str
    found: str
    verdict: str = "ok"  # ok, warning or failed


def run_checks(
    runs: recorders.Runs,
    stage_names: Sequence[str],
    *,
    seconds: float,
    constructor: loop.MakePool = games.make_pool,
) -> list[Check]:
    """Checks the machine and measures the rate of each stage.

    Args:
      runs: One run, or many seeds at once; the folders need not exist, and are not
        made.
      stage_names: `pretrain`, `finetune` or both.
      seconds: How long the rate of each stage is measured, after it has compiled.
      constructor: Makes the environments.

    Returns:
      A `Check` for each line of the table; one that failed would end the run.
    """
    config, workdir, num_seeds = runs.config, runs.workdir, len(runs.seeds)
    checks = [_devices(config), _cores(config)]
    if config.num_devices > 1:
        checks += [_share(config, name) for name in stage_names]
    checks += [_memory(config, name, num_seeds) for name in stage_names]
    place = next(p for p in [workdir, *workdir.absolute().parents] if p.is_dir())
    checks.append(_folder(place))
    checks += [_disk(config, place, name, num_seeds) for name in stage_names]
    if processes.num_processes() > 1:
        checks = _of_all(checks)
    if any(check.verdict == "failed" for check in checks):
        return checks
    for name in stage_names:
        checks.append(_rate(runs, name, seconds, constructor))
    return checks


def print_table(checks: Sequence[Check]) -> None:
    """Prints the checks as a table of one screen."""
    table = rich.table.Table("check", "found", "verdict", title="Preflight")
    for check in checks:
        style = _STYLES[check.verdict]
        table.add_row(check.name, check.found, f"[{style}]{check.verdict}[/]")
    console.make_console().print(table)


def _of_all(checks: list[Check]) -> list[Check]:
    """Puts together what the processes of several hosts have found."""
    found = [Check("processes", processes.describe())]
    for index, own in enumerate(processes.all_gather(checks)):
        for name, *rest in own:
            found.append(Check(f"process {index}: {name}", *rest))
    return found


def _devices(config: config_lib.Config) -> Check:
    there = jax.devices()
    text = f"{len(there)} x {there[0].device_kind} ({there[0].platform})"
    try:
        devices.make_mesh(config.num_devices)
    except ValueError as error:
        return Check("devices", str(error), "failed")
    if config.num_devices > 1:
        text += f", {config.num_devices} of them used"
    is_slow = there[0].platform == "cpu" and config.preset in ("gpu", "paper")
    if is_slow:
        text += f"; preset {config.preset} is made for a GPU or TPU"
    return Check("devices", text, "warning" if is_slow else "ok")


def _share(config: config_lib.Config, name: str) -> Check:
    """Says what lies on each of several devices."""
    count, plan = config.num_devices, _plan(config, name)
    batch = plan.phase.learner.batch
    memory = stages.memory_of(config, is_pretraining=name == stages.PRETRAIN)
    ring = machine.size_text(memory["replay_bytes"] / count)
    text = (
        f"{plan.num_envs // count} environments and their replay ({ring}); "
        f"{batch.num_samples // count} targets"
    )
    if batch.num_particles:
        text += f" and {batch.num_particles // count} particles"
    return Check(f"each device, {name}", f"{text} of a batch; the whole agent")


def _cores(config: config_lib.Config) -> Check:
    warnings: list[str] = []
    machine.check_cores(config.environment.env_threads, warnings.append)
    text = f"{machine.usable_cores():g} that this process may use"
    return Check("cores", "; ".join([text, *warnings]), "warning" if warnings else "ok")


def _folder(place: pathlib.Path) -> Check:
    try:
        machine.check_writable(place)
    except ValueError as error:
        return Check("work directory", str(error), "failed")
    if warning := folders.lock_warning(place):
        return Check("work directory", warning, "warning")
    return Check("work directory", f"{place} can be written")


def _memory(config: config_lib.Config, name: str, num_seeds: int) -> Check:
    is_pretraining = name == stages.PRETRAIN
    memory = stages.memory_of(config, is_pretraining=is_pretraining)
    needed = machine.needed_bytes(**memory, num_seeds=num_seeds)
    ring = num_seeds * memory["replay_bytes"]
    text = (
        f"needs about {machine.size_text(needed)}, "
        f"{machine.size_text(ring)} of it the replay; "
        f"{machine.size_text(machine.available_bytes())} free"
    )
    try:
        stages.check_memory(config, is_pretraining=is_pretraining, num_seeds=num_seeds)
    except ValueError as error:
        return Check(f"memory, {name}", str(error), "failed")
    return Check(f"memory, {name}", text)


def _disk(
    config: config_lib.Config, place: pathlib.Path, name: str, num_seeds: int
) -> Check:
    warnings: list[str] = []
    memory = stages.memory_of(config, is_pretraining=name == stages.PRETRAIN)
    size = memory["replay_bytes"] if config.report.checkpoint_replay else 0
    agent = config.make_agent(MOST_ACTIONS, config.observation)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    fixed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    try:
        machine.check_disk(
            place,
            fixed_bytes=num_seeds * fixed,
            replay_bytes=num_seeds * size,
            kept=config.report.keep_checkpoints,
            warn=warnings.append,
        )
    except ValueError as error:
        return Check(f"disk, {name}", str(error), "failed")
    text = f"a checkpoint takes up to {machine.size_text(fixed + size)}"
    return Check(
        f"disk, {name}", "; ".join([text, *warnings]), "warning" if warnings else "ok"
    )


def _rate(
    runs: recorders.Runs, name: str, seconds: float, constructor: loop.MakePool
) -> Check:
    config = runs.config
    frames_per_second = _measure_rate(runs, name, seconds, constructor)
    frames = len(runs.seeds) * (
        config.pretrain.pretrain_frames
        if name == stages.PRETRAIN
        else config.finetune.finetune_agent_steps * config.observation.frame_skip
    )
    hours = frames / frames_per_second / 3600
    text = (
        f"{frames_per_second:,.0f} frames/s over {seconds:g} s: {frames:,} frames take "
        f"{hours:,.2f} hours"
    )
    if name == stages.FINETUNE:
        text += ", and evaluations come on top"
    return Check(f"rate, {name}", text)


def _measure_rate(
    runs: recorders.Runs, name: str, seconds: float, constructor: loop.MakePool
) -> float:
    """Returns a stage's emulator frames per second, from nothing and saving nothing.

    They are of all seeds together. Learning begins as soon as the replay can be
    sampled, so that it is the rate of all but the warm-up.
    """
    config, seeds = runs.config, runs.seeds
    mesh = devices.make_mesh(config.num_devices)
    plan = _plan(config, name)
    part = devices.process_slice(plan.num_envs, mesh)
    pool = loop.make_pool(
        config, plan.num_envs, plan.act_stream, constructor, part=part, run_seeds=seeds
    )
    try:
        agent = config.make_agent(pool.num_actions, pool.observation)
        states = [loop.init_state(agent, seed, mesh) for seed in seeds]
        if name == stages.FINETUNE:
            states = [
                agent.adapt(
                    loop.stream_key(seed, loop.Stream.ADAPT),
                    agent.start_finetune(state),
                    None,
                )[0]
                for seed, state in zip(seeds, states, strict=True)
            ]
        plan = _plan(config, name, pool.num_actions)
        state = loop.stack_seeds(states, mesh)
        session = loop.start(config, plan, pool, state, mesh=mesh, seeds=seeds)
        session.schedule = plan._replace(warmup_agent_steps=0).schedule()
        return len(seeds) * _play(session, seconds)
    finally:
        pool.close()


def _plan(
    config: config_lib.Config, name: str, num_actions: int = MOST_ACTIONS
) -> loop.Plan:
    agent = config.make_agent(num_actions, config.observation)
    if name == stages.PRETRAIN:
        return loop.pretrain_plan(config, agent)
    return loop.finetune_plan(config, agent)


def _play(session: loop.Session, seconds: float) -> float:
    """Returns the frames per second of a new session, without what compiling takes."""
    learn, schedule = session.learn, session.schedule
    assert learn is not None and schedule is not None
    session.learn = None
    while session.agent_steps <= schedule.start + session.num_envs:
        session.step()
    session.learn = learn
    if schedule.samples_per_step > 0:
        session.state, session.sums, found = learn(
            session.learn_key, session.state, session.sums, session.rollout.replay
        )
        session.rollout = session.rollout.prioritised(found)
    session.step()  # In a world this compiles the whole loop.
    jax.block_until_ready(session.state)
    before, started = session.agent_steps, time.monotonic()
    # Several processes end at the same step.
    while not processes.any_process(time.monotonic() - started >= seconds):
        for _ in range(8):  # To ask takes a millisecond.
            session.step()
    jax.block_until_ready(session.state)
    played = session.agent_steps - before
    frames = played * session.pool.observation.frame_skip
    return frames / (time.monotonic() - started)
